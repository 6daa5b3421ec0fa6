"""Going on with a run, exactly where its checkpoint was saved."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm.models import clean_state_dict
from timm.utils import unwrap_model

from timm_structdrop.errors import UserError
from timm_structdrop.models.weights import Checkpoint, load_weights, read_file
from timm_structdrop.training.checkpoint import EXTENSION, Position, RunState, recoveries

__all__ = ["find_resume", "resume"]


def find_resume(path: str | Path) -> Path:
    """The checkpoint to continue from: ``path`` itself, or in a folder the furthest one.

    A run that dies while it saves the end of an epoch can leave a recovery checkpoint that ``last``
    is ahead of.

    Raises:
        UserError: there is none, or ``path`` is another file.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"--resume must be an existing checkpoint or folder; got {path}")
        if not zipfile.is_zipfile(path):  # as today's checkpoints are: a look costs nothing
            read_file(path)
        return path
    candidates = [*recoveries(path)[-1:], path / f"last{EXTENSION}"]
    found = [candidate for candidate in candidates if candidate.is_file()]
    if not found:
        raise UserError(f"--resume needs a folder with last{EXTENSION} or recovery-*; got {path}")
    return max(found, key=_how_far) if len(found) > 1 else found[0]


def _how_far(path: Path) -> tuple[int, int]:
    position = _position(read_file(path, mapped=True))
    return position.epoch, position.batch


def resume(
    run: RunState, path: Path, weights_only: bool = False
) -> tuple[Position, dict[str, Any]]:
    """Put a run back where its checkpoint was saved. Call it before compiling and wrapping.

    Args:
        run: freshly made from the same settings.
        path: a checkpoint of this package, or of timm's train.py (at the end of an epoch).
        weights_only: leave the optimizer and the scaler as they are.

    Returns:
        Where to go on, and the content of the checkpoint.

    Raises:
        UserError: the file is no training checkpoint, or one of another model or optimizer.
    """
    content = read_file(path)
    if "state_dict" not in content or "optimizer" not in content:
        raise UserError(f"--resume needs a checkpoint of a training run; {path} is not one")
    if str(content.get("arch")).split(".")[0] != run.arch.split(".")[0]:
        raise UserError(
            f"--resume needs a checkpoint of the model that is trained, {run.arch}; "
            f"{path} holds {content.get('arch')}"
        )
    _load_models(run, content, path)
    if not weights_only:
        _load(run.optimizer.load_state_dict, content["optimizer"], "optimizer", path)
        if run.scaler is not None and run.scaler.state_dict_key in content:
            run.scaler.load_state_dict(content[run.scaler.state_dict_key])
        if "lr_scheduler" in content and hasattr(run.scheduler, "lr_scheduler"):
            run.scheduler.lr_scheduler.load_state_dict(content["lr_scheduler"])
    return _position(content), content


def _position(content: Mapping[str, Any]) -> Position:
    """Where a checkpoint of this package goes on, or one of timm's."""
    saved = content.get("position")
    if saved is None:
        return Position(content.get("epoch", -1) + (content.get("version", 1) > 1))
    return Position(**saved)


def _load_models(run: RunState, content: Mapping[str, Any], path: Path) -> None:
    averaged = content.get("state_dict_ema") or content["state_dict"]
    targets = [(run.task.get_trainable_module(), content["state_dict"])]
    if run.task.has_ema():
        targets.append((run.task.get_trainable_module(ema=True), averaged))
    for model, weights in targets:
        weights = clean_state_dict(weights)
        load_weights(unwrap_model(model), Checkpoint(path, weights, run.arch, {}, False), run.arch)


def _load(load: Callable[[Any], object], state: Any, what: str, path: Path) -> None:
    try:
        load(state)
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"the {what} in {path} must fit the one in use; {error}") from error
