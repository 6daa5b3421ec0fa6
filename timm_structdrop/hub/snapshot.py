"""What a training run has to publish: one reading of its best checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from timm_structdrop.errors import UserError
from timm_structdrop.models.weights import Checkpoint, checkpoint_of, find_checkpoint, read_file
from timm_structdrop.training import read_summary

__all__ = ["RunSnapshot", "read_snapshot"]


@dataclass(frozen=True)
class RunSnapshot:
    """The best checkpoint of a run of train.py, as it was when it was read.

    Attributes:
        checkpoint: the weights to publish, and the run's flags; its `is_ema` says whether the
            weights are the averaged ones.
        epoch: that the weights are of, counted from 0; None where the file does not say.
        figures: `top1` and `top5` of these weights, in percent, where they are known.
    """

    checkpoint: Checkpoint
    epoch: int | None
    figures: Mapping[str, float]


def read_snapshot(folder: Path) -> RunSnapshot:
    """The weights that a run's figures are of: the averaged ones if it kept and evaluated them, or
    evaluated nothing.

    The file is read once, because a run that is under way replaces it.

    Raises:
        UserError: there is no checkpoint, or none of a run of train.py.
    """
    path = find_checkpoint(folder)
    content = read_file(path)
    checkpoint = checkpoint_of(content, path)
    if not checkpoint.args:
        raise UserError(f"a run's folder must hold args.yaml; got {folder}")
    averaged, figures = _measured(folder, content, checkpoint.args)
    if averaged:
        checkpoint = checkpoint_of(content, path, use_ema=True)
    return RunSnapshot(checkpoint, content.get("epoch"), MappingProxyType(figures))


def _measured(
    folder: Path, content: Mapping[str, Any], flags: Mapping[str, Any]
) -> tuple[bool, dict[str, float]]:
    """Whether a checkpoint's averaged weights are to be published, and top-1 and top-5 accuracy, in
    percent, of the weights that are."""
    said = content.get("validation")
    if isinstance(said, Mapping):
        accuracy = {key: said[key] for key in ("top1", "top5") if key in said}
        return said.get("weights") == "state_dict_ema", accuracy
    averaged = bool(flags.get("model_ema"))
    if averaged and flags.get("model_ema_force_cpu"):
        return True, {}  # the figures in summary.csv may be of the others
    return averaged, _accuracy(folder, content.get("epoch"))


def _accuracy(folder: Path, epoch: object) -> dict[str, float]:
    """The figures of an epoch in summary.csv, for a checkpoint without figures, such as timm's."""
    rows = [row for row in read_summary(folder / "summary.csv") if row["epoch"] == str(epoch)]
    last = rows[-1] if rows else {}
    return {key: float(last[f"eval_{key}"]) for key in ("top1", "top5") if last.get(f"eval_{key}")}
