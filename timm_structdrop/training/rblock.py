"""R-Block's task: both sub models in one forked forward, and the loss that makes them agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from timm_structdrop.errors import UserError
from timm_structdrop.layers import Fork
from timm_structdrop.training.refit import ClusterRefits
from timm_structdrop.training.schedule import DropSchedule
from timm_structdrop.training.task import StructDropTask

__all__ = ["RBlockTask", "has_fork", "mutual_kl"]


class RBlockTask(StructDropTask):
    """Trains an R-Block model: deep mutual learning of two sub models with different drop regions.

    In training the batch is forked in front of the first R-Block layer, everything before that
    runs once, and the loss is the mean over the batch of Eqs. (1) to (5),

        sum over i = 1, 2 of  (1 - alpha) CE(z_i, y) + alpha T^2 KL(p_j || p_i),  j the other one,

    with logits z_i and p_i = softmax(z_i / T); gradients flow through both arguments of KL. Batch
    norm behind the fork sees both sub models' samples. All is as in a pass of the concatenated
    batch (x, x) but for one thing: of batch norm in front of the fork, which sees each sample once,
    the update of the running variance is (2n - 1) / (2n - 2) times that of the concatenated batch,
    n being the values per channel in the batch (the variance of a sample counted twice is divided
    by 2n - 1 where once gives n - 1). In eval mode the model is the plain model.

    Args:
        model: a model with R-Block in it.
        criterion: CE: loss of (B, classes) logits and the target, averaged over the batch; None for
            cross-entropy. Losses with smoothed or mixed targets are as good.
        schedule: moves the drop rates; None leaves them at their targets.
        refits: when DropCluster layers fit their clusters, if there are such layers.
        temperature: T, above 0.
        alpha: weight of the mutual loss, in [0, 1].
        task_settings: further keywords of ``timm.task.ClassificationTask`` (device, dtype, ...).

    Raises:
        UserError: the model is not forked anywhere, or a setting is out of range.
    """

    forks = True

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        schedule: DropSchedule | None = None,
        refits: ClusterRefits | None = None,
        temperature: float = 3.0,
        alpha: float = 0.1,
        **task_settings: Any,
    ) -> None:
        if not has_fork(model):
            raise UserError(
                "RBlockTask needs a model with R-Block, such as resnet18_rblock or "
                f"attach(model, 'rblock'); got {type(model).__name__} without it"
            )
        if not temperature > 0.0:
            raise UserError(f"temperature must be above 0; got {temperature}")
        if not 0.0 <= alpha <= 1.0:
            raise UserError(f"alpha must be in [0, 1]; got {alpha}")
        super().__init__(model, criterion, schedule, refits, **task_settings)
        self.temperature = temperature
        self.alpha = alpha

    def step(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) and their target to the loss and its parts.

        Returns:
            ``loss``; ``output``, the mean of the two sub models' logits, (B, classes); and the
            parts of the loss, detached: ``ce`` and ``kl``, each the sum over the two sub models,
            so that loss = (1 - alpha) ce + alpha T^2 kl. In eval mode those of the plain model,
            without parts.
        """
        if not self.trainable_module.training:
            return super().step(input, target)
        logits = self.trainable_module(input)
        if len(logits) != 2 * len(input):
            raise UserError(
                f"a forked model must give 2B = {2 * len(input)} logits for B images; "
                f"got {len(logits)}"
            )
        first, second = logits.chunk(2)
        ce = self.criterion(first, target) + self.criterion(second, target)
        kl = mutual_kl(first, second, self.temperature)
        loss = (1.0 - self.alpha) * ce + self.alpha * self.temperature**2 * kl
        return {
            "loss": loss,
            "output": (first + second) / 2,
            "ce": ce.detach(),
            "kl": kl.detach(),
        }


def mutual_kl(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """KL(p_2 || p_1) + KL(p_1 || p_2), Eq. (3), of tempered softmaxes, Eq. (1).

    Args:
        first: logits of sub model 1, (B, classes).
        second: logits of sub model 2, (B, classes).
        temperature: T, above 0; not checked.

    Returns:
        The mean over the batch, 0-d, in float32 whatever the logits' precision.
    """
    log_first = F.log_softmax(first.float() / temperature, dim=1)
    log_second = F.log_softmax(second.float() / temperature, dim=1)
    return F.kl_div(log_first, log_second, reduction="batchmean", log_target=True) + F.kl_div(
        log_second, log_first, reduction="batchmean", log_target=True
    )


def has_fork(model: nn.Module) -> bool:
    """Whether the model has R-Block and the fork that it needs."""
    return any(isinstance(module, Fork) for module in model.modules())
