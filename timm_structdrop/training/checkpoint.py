"""Checkpoints that hold a whole run and are written whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import CheckpointSaver, unwrap_model
from torch import nn
from torch.optim import Optimizer

from timm_structdrop.errors import UserError
from timm_structdrop.files import replace_with_link, write_whole
from timm_structdrop.models.weights import read_file
from timm_structdrop.training.task import StructDropTask

__all__ = ["EXTENSION", "Position", "RunSaver", "RunState", "recoveries"]

EXTENSION = ".pth.tar"
RECOVERY = re.compile(r"recovery-(\d+)-(\d+)\.pth\.tar")


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        epoch: the epoch to train next, or in progress, counted from 0.
        batch: batches of it that are done.
        update: optimizer updates done since the start of the run.
        sums: what the epoch in progress has added up for its means (loss, images, ...), over all
            processes of the run.
    """

    epoch: int = 0
    batch: int = 0
    update: int = 0
    sums: Mapping[str, float] = field(default_factory=dict)


@dataclass
class RunState:
    """What a run consists of beside its data: all that a checkpoint saves and a resume restores.

    Attributes:
        arch: the model's name, which a checkpoint has to share.
        task: holds the model and its averaged copy.
        optimizer: the optimizer.
        scheduler: timm's learning rate scheduler, or None.
        scaler: timm's ``NativeScaler``, or None.
        settings: the run's flags, saved for whoever reads the checkpoint.
    """

    arch: str
    task: StructDropTask
    optimizer: Optimizer
    scheduler: Any = None
    scaler: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def state(self, position: Position) -> dict[str, Any]:
        """The content of a checkpoint, without the saver's bookkeeping.

        timm's keys have timm's meaning (``epoch`` is the last one trained to its end), so that
        timm's scripts read these files too.
        """
        content = {
            "epoch": position.epoch - 1,
            "version": 2,
            "arch": self.arch,
            "args": dict(self.settings),
            "position": asdict(position),
            "optimizer": self.optimizer.state_dict(),
            **self.task.get_checkpoint_state(),
            **self.task.get_checkpoint_state(ema=True),
        }
        if self.scaler is not None:
            content[self.scaler.state_dict_key] = self.scaler.state_dict()
        if hasattr(self.scheduler, "lr_scheduler"):
            # plateau counts bad epochs; timm's other schedules are functions of the position
            content["lr_scheduler"] = self.scheduler.lr_scheduler.state_dict()
        return content


class RunSaver(CheckpointSaver):
    """timm's `CheckpointSaver` (last, the best N, model_best, recovery) for a whole `RunState`.

    The difference is in the writing. Each file is written under a temporary name and renamed; the
    names of an epoch (``checkpoint-N``, ``model_best``, then ``last``) follow from one write; and
    what is no longer wanted is deleted last. So whenever a run dies, in the middle of saving too,
    ``last`` is whole and its own list of the best agrees with the files beside it.

    Args:
        run: what to save.
        folder: where to.
        decreasing: whether a lower metric is better.
        max_history: how many of the best checkpoints to keep, at least 1.
    """

    best_metric: float | None
    best_epoch: int | None

    def __init__(
        self, run: RunState, folder: Path, decreasing: bool = False, max_history: int = 10
    ) -> None:
        if max_history < 1:
            raise UserError(f"at least 1 checkpoint must be kept; got {max_history}")
        super().__init__(
            model=unwrap_model(run.task.get_trainable_module()),
            optimizer=run.optimizer,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=decreasing,
            max_history=max_history,
        )
        self.run = run
        self.folder = folder

    def save_checkpoint(
        self,
        epoch: int,
        metric: float | None = None,
        update: int = 0,
        validation: Mapping[str, Any] | None = None,
    ) -> tuple[float | None, int | None]:
        """Save the state after ``epoch``.

        Args:
            epoch: the epoch that is over, counted from 0.
            metric: ranks it; None keeps it by recency only.
            update: optimizer updates done since the start of the run.
            validation: figures of its evaluation for whoever publishes it, and under ``weights``
                the key of the weights that they are of: ``state_dict`` or ``state_dict_ema``.

        Returns:
            The best metric so far and its epoch.

        Raises:
            UserError: the files cannot be written, or weights are not finite; those of before are
                intact.
        """
        path, fresh = self._path(f"checkpoint-{epoch}"), self._path("fresh")
        files = self._ranked(str(path), metric)
        is_best = metric is not None and (
            self.best_metric is None or self.cmp(metric, self.best_metric)
        )
        before = self.state_dict()
        self.checkpoint_files = files[: self.max_history]
        if is_best:
            self.best_metric, self.best_epoch = metric, epoch
        try:
            self._write(fresh, Position(epoch + 1, 0, update), metric, validation)
            if (str(path), metric) in self.checkpoint_files:
                replace_with_link(fresh, path)
            if is_best:
                replace_with_link(fresh, self._path("model_best"))
            fresh.replace(self._path("last"))
        except BaseException:
            fresh.unlink(missing_ok=True)
            self.load_state_dict(before)
            raise
        for name, _ in files[self.max_history :]:
            Path(name).unlink(missing_ok=True)
        for file in recoveries(self.folder):
            file.unlink(missing_ok=True)
        return self.best_metric, self.best_epoch

    def save_recovery(
        self,
        epoch: int,
        batch_idx: int = 0,
        update: int = 0,
        sums: Mapping[str, float] | None = None,
    ) -> Path:
        """Save the state in the middle of ``epoch``, after ``batch_idx`` batches, in place of the
        recovery checkpoint of before.

        Raises:
            UserError: the file cannot be written, or weights are not finite; the one of before is
                intact.
        """
        before = recoveries(self.folder)
        path = self._path(f"recovery-{epoch}-{batch_idx}")
        self._write(path, Position(epoch, batch_idx, update, dict(sums or {})))
        for file in before:
            if file != path:
                file.unlink(missing_ok=True)
        return path

    def restore(self, content: Mapping[str, Any], source: Path) -> None:
        """Take over the list of the best from a checkpoint at ``source``, as far as the files
        are in this folder, and make ``model_best`` the best one of that time.

        Without that one's file the search for the best begins again.
        """
        self.load_state_dict(content.get("saver", {}))
        if self.best_epoch is None:
            return
        checkpoint = source.parent / f"checkpoint-{self.best_epoch}{EXTENSION}"
        best = self._path("model_best")
        if checkpoint.is_file():
            replace_with_link(checkpoint, best)
        elif not best.is_file() or read_file(best).get("epoch") != self.best_epoch:
            self.best_metric = self.best_epoch = None

    def _write(
        self,
        path: Path,
        position: Position,
        metric: float | None = None,
        validation: Mapping[str, Any] | None = None,
    ) -> None:
        _check_finite(self.run.task.get_trainable_module(), position)
        content = self.run.state(position)
        if metric is not None:
            content["metric"] = metric
        if validation is not None:
            content["validation"] = dict(validation)
        # timm has load_state_dict add the checkpoint being written; here it is in the list
        content["saver"] = {**self.state_dict(), "pending": (None, None)}
        write_whole(path, lambda file: torch.save(content, file))

    def _ranked(self, path: str, metric: float | None) -> list[tuple[str, Any]]:
        """Best first, earlier before later among equals; those without a metric, newest first."""
        others = [file for file in self.checkpoint_files if file[0] != path]
        ranked = [file for file in others if file[1] is not None]
        unranked = [file for file in others if file[1] is None]
        if metric is None:
            unranked.insert(0, (path, metric))
        else:
            ranked.append((path, metric))
        return sorted(ranked, key=lambda file: file[1], reverse=not self.decreasing) + unranked

    def _path(self, stem: str) -> Path:
        return self.folder / f"{stem}{EXTENSION}"


def _check_finite(model: nn.Module, position: Position) -> None:
    """A run cannot be continued from weights that are not finite; the loss tells of them only at
    the next step."""
    named = [(name, weight.detach()) for name, weight in model.named_parameters()]
    finite = torch.stack([weight.isfinite().all() for _, weight in named]).tolist()
    if not all(finite):
        where = f"batch {position.batch} of epoch {position.epoch + 1}"
        if not position.batch:
            where = f"the last batch of epoch {position.epoch}"
        raise UserError(
            f"weights must be finite to be saved; {named[finite.index(False)][0]} is not after "
            f"{where} (a lower learning rate, --clip-grad or no --amp may help)"
        )


def recoveries(folder: Path) -> list[Path]:
    """Recovery checkpoints, the furthest last."""
    found = [
        (RECOVERY.fullmatch(file.name), file) for file in folder.glob(f"recovery-*{EXTENSION}")
    ]
    named = [(int(match[1]), int(match[2]), file) for match, file in found if match]
    return [file for _, _, file in sorted(named)]
