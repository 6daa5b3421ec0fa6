"""One epoch of training: batches, gradients, optimizer updates, and what follows each update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from timm_structdrop.errors import UserError
from timm_structdrop.training.checkpoint import Position, RunSaver, RunState
from timm_structdrop.training.files import SummaryFile
from timm_structdrop.training.interrupt import StopRequest, TrainingStopped
from timm_structdrop.training.progress import Progress
from timm_structdrop.training.seeding import seed_everything, set_loader_epoch

__all__ = ["Loop", "LoopSettings", "learning_rate", "train_one_epoch"]

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
        eval_metric: "top1", "top5" or "loss", what the best checkpoint is best at.
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
    def updates_per_epoch(self) -> int:
        return math.ceil(len(self.loader) / self.settings.grad_accum_steps)

    def updates_before(self, position: Position) -> int:
        """Optimizer updates of the run before ``position``."""
        in_epoch = math.ceil(position.batch / self.settings.grad_accum_steps)
        return position.epoch * self.updates_per_epoch + in_epoch

    @property
    def is_primary(self) -> bool:
        return self.settings.rank == 0


def train_one_epoch(loop: Loop, position: Position) -> dict[str, float]:
    """Train the rest of ``position``'s epoch.

    Returns:
        Means over the epoch's images and all processes: ``loss``, ``top1`` (percent), and the
        parts of the loss that the task names.
    """
    settings, run, epoch = loop.settings, loop.run, position.epoch
    accumulate, n_batches = settings.grad_accum_steps, len(loop.loader)
    _switch_mixup(loop, epoch)
    set_loader_epoch(loop.loader, settings.seed, epoch, settings.rank)
    run.task.begin_epoch(epoch, position.batch)
    run.task.get_trainable_module().train()
    run.optimizer.zero_grad()
    sums = dict(position.sums)
    progress = Progress(
        f"Train {epoch + 1}/{settings.epochs}", n_batches, settings.log_interval,
        position.batch, enabled=loop.is_primary,
    )  # fmt: skip
    for batch, (images, target) in enumerate(loop.loader):
        if batch < position.batch:
            continue
        update = epoch * loop.updates_per_epoch + batch // accumulate
        if batch % accumulate == 0:
            run.task.begin_update(update)
        seed_everything("step", settings.seed, epoch, batch, settings.rank)
        first_of_update = batch - batch % accumulate
        of_update = min(accumulate, n_batches - first_of_update)
        need_update = batch + 1 == first_of_update + of_update
        figures = _step(loop, images, target, of_update, need_update)
        if not math.isfinite(figures["loss"]):
            raise UserError(
                f"the loss must be finite; got {figures['loss']} in epoch {epoch}, step {batch} "
                "(a lower learning rate, --clip-grad or no --amp may help)"
            )
        for name, value in {**figures, "images": 1.0}.items():
            sums[name] = sums.get(name, 0.0) + value * len(target)
        progress.update(
            len(target) * settings.world_size, {**_means(sums), "lr": learning_rate(run.optimizer)}
        )
        if need_update:
            _after_update(loop, Position(epoch, batch + 1, update + 1, sums))
    progress.close()
    if settings.world_size > 1:
        sums = _sum_over_processes(sums, loop.device)
    return _means(sums)


def _step(
    loop: Loop, images: Tensor, target: Tensor, of_update: int, need_update: bool
) -> dict[str, float]:
    """Forward, backward and, at the end of the accumulated batches, the optimizer's update.

    Returns:
        The batch's ``loss``, ``top1`` in percent, and the parts of the loss that the task names.
    """
    settings, task = loop.settings, loop.run.task
    images = images.to(loop.device, non_blocking=True)
    target = target.to(loop.device, non_blocking=True)
    if loop.mixup is not None:
        images, target = loop.mixup(images, target)
    if settings.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with nullcontext() if need_update else task.no_sync():
        with _autocast(loop):
            result = task(images, target)
        _backward(loop, result["loss"] / of_update, need_update)
    labels = target.argmax(1) if target.ndim == 2 else target
    figures = {
        "loss": result["loss"],
        "top1": 100.0 * (result["output"].argmax(1) == labels).float().mean(),
    }
    figures |= {name: part for name, part in result.items() if part.ndim == 0}
    values = torch.stack([figure.detach().float() for figure in figures.values()])
    return dict(zip(figures, values.tolist(), strict=True))


def _autocast(loop: Loop) -> AbstractContextManager[Any]:
    if loop.settings.amp_dtype is None:
        return nullcontext()
    return torch.autocast(loop.device.type, dtype=loop.settings.amp_dtype)


def _backward(loop: Loop, loss: Tensor, need_update: bool) -> None:
    settings, run = loop.settings, loop.run
    second_order = getattr(run.optimizer, "is_second_order", False)
    clip = None
    if settings.clip_grad is not None:
        clip = run.task.get_clip_parameters(exclude_head=settings.clip_mode == "agc")
    if run.scaler is not None:
        run.scaler(
            loss, run.optimizer, clip_grad=settings.clip_grad, clip_mode=settings.clip_mode,
            parameters=clip, create_graph=second_order, need_update=need_update,
        )  # fmt: skip
        return
    loss.backward(create_graph=second_order)
    if need_update:
        if clip is not None:
            dispatch_clip_grad(clip, value=settings.clip_grad, mode=settings.clip_mode)
        run.optimizer.step()


def _after_update(loop: Loop, position: Position) -> None:
    """What follows an optimizer update: averages, learning rate, recovery checkpoint."""
    settings, run = loop.settings, loop.run
    run.optimizer.zero_grad()
    run.task.update_ema(step=position.update)
    if settings.synchronize_step and loop.device.type == "cuda":
        torch.cuda.synchronize()
    if run.scheduler is not None:
        run.scheduler.step_update(position.update)
    every = settings.recovery_interval
    if loop.saver is not None and (loop.stop.requested or (every and position.update % every == 0)):
        loop.saver.save_recovery(position.epoch, position.batch, position.update, position.sums)
    if loop.stop.requested:
        raise TrainingStopped


def _switch_mixup(loop: Loop, epoch: int) -> None:
    off = loop.settings.mixup_off_epoch
    if not off or epoch < off:
        return
    if loop.mixup is not None:
        loop.mixup.mixup_enabled = False  # type: ignore[attr-defined]
    elif hasattr(loop.loader, "mixup_enabled"):
        loop.loader.mixup_enabled = False


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    return {name: value / sums["images"] for name, value in sums.items() if name != "images"}


def _sum_over_processes(sums: Mapping[str, float], device: torch.device) -> dict[str, float]:
    dtype = torch.float32 if device.type == "mps" else torch.float64
    values = torch.tensor(list(sums.values()), dtype=dtype, device=device)
    dist.all_reduce(values)
    return dict(zip(sums, values.tolist(), strict=True))


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The mean learning rate of the optimizer's parameter groups."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return sum(rates) / len(rates)
