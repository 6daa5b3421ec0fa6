"""The training loop: epochs with their evaluation, their row in summary.csv and checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from timm.utils import distribute_bn

from timm_structdrop.errors import UserError
from timm_structdrop.models.placement import structdrop_layers
from timm_structdrop.training.checkpoint import Position
from timm_structdrop.training.epoch import learning_rate, train_one_epoch
from timm_structdrop.training.interrupt import TrainingStopped
from timm_structdrop.training.parts import Loop
from timm_structdrop.training.schedule import live_drop_prob
from timm_structdrop.words import counted

__all__ = ["fit"]

_logger = logging.getLogger(__name__)


def fit(loop: Loop, start: Position | None = None) -> list[dict[str, Any]]:
    """Train from ``start`` (the beginning, if None) to the last epoch.

    Returns:
        What this call trained: for each epoch ``epoch``, ``train`` and, where it was evaluated,
        ``validation`` figures.

    Raises:
        UserError: the loss is not finite, a checkpoint cannot be written, or the saver would keep
            the worst ones.
        TrainingStopped: the process got SIGTERM; the state after the update it was in is saved.
    """
    position = start or Position()
    results = []
    _check_saver(loop)
    with loop.stop:
        while position.epoch < loop.settings.epochs:
            results.append(_epoch(loop, position))
            if loop.after_epoch is not None:
                loop.after_epoch(position.epoch)
            position = Position(position.epoch + 1)
            (stop,) = loop.anywhere(loop.stop.requested)
            saved = position.epoch % loop.settings.val_interval == 0
            if stop and saved and position.epoch < loop.settings.epochs:
                raise TrainingStopped
    return results


def _check_saver(loop: Loop) -> None:
    ranking = loop.ranking
    if loop.saver is not None and loop.saver.decreasing != ranking.decreasing:
        raise UserError(
            f"decreasing of the saver must be {ranking.decreasing} for checkpoints ranked by "
            f"{ranking.words}; got {loop.saver.decreasing}"
        )


def _epoch(loop: Loop, position: Position) -> dict[str, Any]:
    """Train and evaluate one epoch, write its row and its checkpoint."""
    settings, run, epoch = loop.settings, loop.run, position.epoch
    train = train_one_epoch(loop, position)
    if settings.world_size > 1 and settings.dist_bn:
        _distribute_bn(loop)
    _log_refits(loop, epoch)
    last = epoch + 1 == settings.epochs
    due = last or (epoch + 1) % settings.val_interval == 0
    validation = _evaluate(loop) if due else None
    figures = {"epoch": epoch, "train": train}
    if validation is not None:
        figures["validation"] = validation
    metric = loop.ranking.figure(figures) if due else None
    if loop.summary is not None:
        loop.summary.append(_row(loop, epoch, train, validation))
    if run.scheduler is not None:
        run.scheduler.step(epoch + 1, metric)
    if loop.saver is not None and due:
        update = (epoch + 1) * loop.updates_per_epoch
        loop.saver.save_checkpoint(epoch, metric, update, _of_weights(loop, validation))
    return figures


def _distribute_bn(loop: Loop) -> None:
    settings, task = loop.settings, loop.run.task
    for model in (task.get_trainable_module(), task.get_trainable_module(ema=True)):
        if model is not None:
            distribute_bn(model, settings.world_size, settings.dist_bn == "reduce")


def _log_refits(loop: Loop, epoch: int) -> None:
    refits = loop.run.task.refits
    for name, fit in (refits.report(epoch) if refits is not None else {}).items():
        index = fit["adjusted_rand_index"]
        changed = "the first fit" if index is None else f"{index:.3f} adjusted Rand index to before"
        _logger.info(
            f"Clusters of {name} fitted in epoch {epoch + 1}/{loop.settings.epochs}: "
            f"{fit['n_clusters']} in each of {counted(fit['channels'], 'channel')}, "
            f"{fit['unstructured']} unstructured, {changed}, "
            f"{fit['seconds']:.2f} s"
        )


def _evaluate(loop: Loop) -> dict[str, float] | None:
    """Figures of the model, or of its averaged copy where it is kept on the same device."""
    if loop.evaluate is None:
        return None
    task = loop.run.task
    figures = loop.evaluate(task.get_eval_model(), "Validate")
    if loop.measures_average:
        figures = loop.evaluate(task.get_eval_model(ema=True), "Validate (EMA)")
    return dict(figures)


def _of_weights(loop: Loop, validation: Mapping[str, float] | None) -> dict[str, Any] | None:
    """The figures with the checkpoint's key of the weights that they are of."""
    if validation is None:
        return None
    weights = "state_dict_ema" if loop.measures_average else "state_dict"
    return {"weights": weights, **validation}


def _row(
    loop: Loop,
    epoch: int,
    train: Mapping[str, float],
    validation: Mapping[str, float] | None,
) -> dict[str, Any]:
    """The columns of timm's summary.csv, and the live drop rate and clusters where there are."""
    row: dict[str, Any] = {"epoch": epoch}
    row |= {f"train_{name}": value for name, value in train.items()}
    if loop.evaluate is not None:
        names = ("loss", "top1", "top5")
        row |= {f"eval_{name}": (validation or {}).get(name, "") for name in names}
    row["lr"] = learning_rate(loop.run.optimizer)
    layers = list(structdrop_layers(loop.run.task.get_trainable_module()))
    if layers:
        row["drop_prob"] = live_drop_prob(layers)
    if loop.run.task.refits is not None:
        row |= loop.run.task.refits.summary()
    return row
