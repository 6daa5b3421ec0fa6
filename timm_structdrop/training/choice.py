"""Which task trains which model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from timm_structdrop.training.rblock import RBlockTask, has_fork
from timm_structdrop.training.task import StructDropTask

__all__ = ["make_task"]


def make_task(
    model: nn.Module,
    criterion: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
    **settings: Any,
) -> StructDropTask:
    """The task that suits the regularizers in ``model``.

    It is an `RBlockTask` if R-Block is among them, else a `StructDropTask`; the keywords are those
    of the task.
    """
    if has_fork(model):
        return RBlockTask(model, criterion, **settings)
    return StructDropTask(model, criterion, **settings)
