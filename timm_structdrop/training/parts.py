"""What a training loop works with: its objects, its settings, and how far the processes are one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from timm_structdrop.training.checkpoint import Position, RunSaver, RunState
from timm_structdrop.training.interrupt import StopRequest
from timm_structdrop.training.ranking import Ranking
from timm_structdrop.training.summary import SummaryFile

__all__ = ["Loop", "LoopSettings"]

Evaluate = Callable[[nn.Module, str], Mapping[str, float]]


@dataclass(frozen=True)
class LoopSettings:
    """What `fit` needs to know; the names are those of the flags of train.py.

    Attributes:
        epochs: epochs of the whole run, at least 1.
        seed: all randomness of the training is a function of it, at least 0.
        grad_accum_steps: batches per optimizer update.
        clip_grad: bound for ``clip_mode`` ("norm", "value" or "agc"); None to not clip.
        amp_dtype: autocast to it; None for none.
        channels_last: memory format of the images.
        mixup_off_epoch: no mixup or cutmix from this epoch on; 0 for always.
        val_interval: epochs between evaluations; the last epoch is always evaluated.
        eval_metric: "top1", "top5" or "loss", what the best checkpoint is best at in the
            evaluation; without one it is the training loss.
        log_interval: steps between progress lines where there is no terminal.
        recovery_interval: updates between recovery checkpoints; 0 for none.
        dist_bn: "reduce", "broadcast" or "", how processes agree on batch norm statistics.
        synchronize_step: wait for the GPU after each update.
        rank: this process.
        world_size: number of processes.
    """

    epochs: int
    seed: int = 42
    grad_accum_steps: int = 1
    clip_grad: float | None = None
    clip_mode: str = "norm"
    amp_dtype: torch.dtype | None = None
    channels_last: bool = False
    mixup_off_epoch: int = 0
    val_interval: int = 1
    eval_metric: str = "top1"
    log_interval: int = 50
    recovery_interval: int = 0
    dist_bn: str = "reduce"
    synchronize_step: bool = False
    rank: int = 0
    world_size: int = 1


@dataclass
class Loop:
    """The objects that `fit` works with.

    Attributes:
        run: model, optimizer and what else is saved in checkpoints.
        loader: batches of images (B, C, H, W) and targets, map-style data for exact resuming.
        device: where the model is.
        settings: see `LoopSettings`.
        mixup: timm's ``Mixup`` where the loader does not do it, or None.
        evaluate: (model, title) to at least ``loss`` and the eval metric; None for no evaluation.
        saver: writes checkpoints; None for none, as on every process but the first.
        summary: gets a row for each epoch; None for none.
        after_epoch: called with each epoch's number when all of it is saved; None for nothing.
    """

    run: RunState
    loader: Any
    device: torch.device
    settings: LoopSettings
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    evaluate: Evaluate | None = None
    saver: RunSaver | None = None
    summary: SummaryFile | None = None
    after_epoch: Callable[[int], None] | None = None
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def ranking(self) -> Ranking:
        """What the best epoch is best at."""
        return Ranking.of_run(self.settings.eval_metric, self.evaluate is not None)

    @property
    def measures_average(self) -> bool:
        """Whether an evaluation's figures are of the averaged weights: where there are such, kept
        on the device that the model is on."""
        averaged = self.run.task.get_trainable_module(ema=True)
        return averaged is not None and averaged.device in (None, self.device)

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates in an epoch, the last of which may have fewer batches."""
        return math.ceil(len(self.loader) / self.settings.grad_accum_steps)

    def updates_before(self, position: Position) -> int:
        """Optimizer updates of the run before ``position``."""
        in_epoch = math.ceil(position.batch / self.settings.grad_accum_steps)
        return position.epoch * self.updates_per_epoch + in_epoch

    @property
    def is_primary(self) -> bool:
        """Whether this process writes files and progress."""
        return self.settings.rank == 0

    def anywhere(self, *facts: bool) -> tuple[bool, ...]:
        """Each of the facts, whether it is so in any process; all processes have to ask."""
        if self.settings.world_size == 1:
            return facts
        values = torch.tensor(facts, dtype=torch.int32, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return tuple(value > 0 for value in values.tolist())
