"""One epoch of training: batches, gradients, optimizer updates, and what follows each update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from timm.utils import dispatch_clip_grad
from torch import Tensor

from timm_structdrop.data.workers import read_batches
from timm_structdrop.errors import UserError, dead_worker
from timm_structdrop.training.checkpoint import Position
from timm_structdrop.training.interrupt import TrainingStopped
from timm_structdrop.training.parts import Loop
from timm_structdrop.training.progress import Progress
from timm_structdrop.training.seeding import seed_everything, set_loader_epoch, starting_at

__all__ = ["learning_rate", "train_one_epoch"]


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
    if position.batch:  # the rate is that of the last update also where no batch is left
        run.task.begin_update(loop.updates_before(position) - 1)
    run.task.get_trainable_module().train()
    run.optimizer.zero_grad()
    sums = _sums_to_go_on_with(loop, position)
    progress = Progress(
        f"Train {epoch + 1}/{settings.epochs}", n_batches, settings.log_interval,
        position.batch, enabled=loop.is_primary,
    )  # fmt: skip
    done = position.batch
    with starting_at(loop.loader, position.batch) as left_out:
        for batch, (images, target) in _batches(loop, left_out):
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
            (not_finite,) = loop.anywhere(not math.isfinite(figures["loss"]))
            if not_finite:
                _refuse_loss(loop, figures["loss"], epoch, batch)
            for name, value in {**figures, "images": 1.0}.items():
                sums[name] = sums.get(name, 0.0) + value * len(target)
            progress.update(
                len(target) * settings.world_size,
                {**_means(sums), "lr": learning_rate(run.optimizer)},
            )
            if need_update:
                _after_update(loop, Position(epoch, batch + 1, update + 1, sums))
            done = batch + 1
    if done < n_batches and loop.stop.requested:
        update = epoch * loop.updates_per_epoch + done // accumulate
        _stop_between_updates(loop, Position(epoch, done, update, sums))
    progress.close()
    return _means(_over_processes(loop, sums))


def _sums_to_go_on_with(loop: Loop, position: Position) -> dict[str, float]:
    """They are of all processes, so the first one has them; the others begin at zero."""
    if loop.is_primary:
        return dict(position.sums)
    return dict.fromkeys(position.sums, 0.0)


def _batches(loop: Loop, first: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """The batches of an epoch, counted from ``first``; they end early where the workers that read
    them were told to end together with this process."""
    try:
        yield from enumerate(read_batches(loop.loader), first)
    except RuntimeError as error:
        if not loop.stop.requested or dead_worker(error) is None:
            raise


def _refuse_loss(loop: Loop, loss: float, epoch: int, batch: int) -> NoReturn:
    got = "another one in another process" if math.isfinite(loss) else loss
    raise UserError(
        f"the loss must be finite; got {got} in epoch {epoch + 1}/{loop.settings.epochs}, "
        f"batch {batch + 1}/{len(loop.loader)} (a lower learning rate, --clip-grad or no --amp may "
        "help)"
    )


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
    """What follows an optimizer update: averages, learning rate, recovery checkpoint, the end."""
    settings, run = loop.settings, loop.run
    run.optimizer.zero_grad()
    run.task.update_ema(step=position.update)
    if settings.synchronize_step and loop.device.type == "cuda":
        torch.cuda.synchronize()
    if run.scheduler is not None:
        run.scheduler.step_update(position.update)
    (stop,) = loop.anywhere(loop.stop.requested)
    every = settings.recovery_interval
    if stop or (every and position.update % every == 0):
        _save_recovery(loop, position, _over_processes(loop, position.sums))
    if stop:
        raise TrainingStopped


def _save_recovery(loop: Loop, position: Position, sums: Mapping[str, float]) -> None:
    if loop.saver is not None:
        loop.saver.save_recovery(position.epoch, position.batch, position.update, sums)


def _stop_between_updates(loop: Loop, position: Position) -> NoReturn:
    """End a run that waits for workers which have ended already; between the batches of an update
    there is nothing that could be saved."""
    if position.batch % loop.settings.grad_accum_steps == 0:
        # the other processes may be elsewhere: what this one has seen stands for all
        processes = loop.settings.world_size
        sums = {name: value * processes for name, value in position.sums.items()}
        _save_recovery(loop, position, sums)
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


def _over_processes(loop: Loop, sums: Mapping[str, float]) -> dict[str, float]:
    """The sums of all processes; all of them have to ask."""
    if loop.settings.world_size == 1:
        return dict(sums)
    dtype = torch.float32 if loop.device.type == "mps" else torch.float64
    values = torch.tensor(list(sums.values()), dtype=dtype, device=loop.device)
    dist.all_reduce(values)
    return dict(zip(sums, values.tolist(), strict=True))


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The mean learning rate of the optimizer's parameter groups."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return sum(rates) / len(rates)
