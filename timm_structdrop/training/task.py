"""Training tasks on timm.task: what the regularizers need around a plain forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

from timm_structdrop.models.placement import structdrop_layers
from timm_structdrop.training.refit import ClusterRefits
from timm_structdrop.training.schedule import DropSchedule
from timm_structdrop.training.steps import (
    classifier_weight,
    predicted_classes,
    repeat_in_backward,
    tell_step,
)

__all__ = ["StructDropTask"]


class StructDropTask(ClassificationTask):
    """timm's classification task that also drives the drop schedule and the cluster refits, and
    tells the layers that need it (CamDrop) the target, or the network's own prediction.

    The prediction is that of one more forward of the batch, in eval mode and without gradients,
    before the one that is trained on: no forward of a training loop predicts a batch before it is
    trained on. It costs about a third of a step, and is made only for layers that ask for it.

    In a loop of one's own::

        task = StructDropTask(model, criterion, schedule, refits)
        task.begin_epoch(epoch)        # at the start of each epoch
        task.begin_update(update)      # before each optimizer update
        loss = task(images, target)["loss"]

    Args:
        model: the model to train.
        criterion: loss of (B, classes) logits and the target; None for cross-entropy.
        schedule: moves the drop rates; None leaves them at their targets.
        refits: when DropCluster layers fit their clusters; None leaves that to the layers.
        task_settings: further keywords of ``timm.task.ClassificationTask`` (device, dtype, ...).

    Raises:
        UserError: the model has CamDrop guided by a class and no linear classifier.
    """

    forks: ClassVar[bool] = False  # the activations are doubled on their way through the model

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        schedule: DropSchedule | None = None,
        refits: ClusterRefits | None = None,
        **task_settings: Any,
    ) -> None:
        super().__init__(model, criterion, **task_settings)
        self.schedule = schedule
        self.refits = refits
        layers = list(structdrop_layers(model))
        self.needed = {layer.needs_classes for layer in layers} - {None}
        if any(layer.needs_classes and layer.needs_classifier for layer in layers):
            classifier_weight(model)
        self.is_compiled = False

    def begin_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Ask for the cluster fits that are due in ``epoch``.

        Args:
            epoch: the epoch about to start, counted from 0.
            first_batch: batches of it already trained on by the run that is being continued; a
                fit belongs to the first batch, so above 0 it has taken place.
        """
        if self.refits is not None and first_batch == 0 and self.refits.due(epoch):
            self.refits.request(epoch)

    def begin_update(self, update: int) -> None:
        """Set the drop rates of the optimizer update ``update``, counted from 0 over the run."""
        if self.schedule is not None:
            self.schedule.step(update)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) and their target to ``{"loss": ..., "output": logits}``.

        The target is class indices (B,) or class weights (B, classes), whatever the loss takes.
        The forward in which clusters are fitted runs without ``torch.compile``'s code, which
        cannot hold a fit.
        """
        if self.refits is None or not self.refits.pending:
            return self._told_step(input, target)
        with self._eager():
            result = self._told_step(input, target)
        self.refits.done()
        return result

    def guides(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The classes that guide the layers: ``"target"`` and ``"prediction"``, as they need."""
        found = {}
        if "target" in self.needed:
            found["target"] = target
        if "prediction" in self.needed:
            found["prediction"] = predicted_classes(self.trainable_module, input)
        return found

    def _told_step(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        if not (self.trainable_module.training and (self.needed or self.forks)):
            return self.step(input, target)
        guides = self.guides(input, target)
        with tell_step(
            self.trainable_module, **guides, batch=len(input), forked=self.forks
        ) as told:
            result = self.step(input, target)
        repeat_in_backward(told, list(result.values()))
        return result

    def step(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The forward and the loss, for subclasses to change; the result is :meth:`forward`'s."""
        result: dict[str, Tensor] = super().forward(input, target)
        return result

    def compile(self, *args: Any, **settings: Any) -> nn.Module:
        """Compile the model, as timm's task does."""
        self.is_compiled = True
        return super().compile(*args, **settings)

    def _eager(self) -> AbstractContextManager[Any]:
        return torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()
