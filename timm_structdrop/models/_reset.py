"""Layers at a model's head stay there when timm's ``reset_classifier`` makes the head anew."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from timm_structdrop.layers import StructDropLayer
from timm_structdrop.models.slots import Slot, insert

__all__ = ["keep_on_reset"]

Placed = tuple[Slot, StructDropLayer]


def keep_on_reset(model: nn.Module, placed: Sequence[Placed]) -> None:
    """From now on ``model.reset_classifier`` puts these layers back where it takes them away.

    Args:
        model: the model, with a ``reset_classifier`` or without.
        placed: layers in it, each with its slot.
    """
    if not callable(getattr(model, "reset_classifier", None)):
        return
    at_head = [(slot, layer) for slot, layer in placed if slot.kind in ("head", "module")]
    if not at_head:
        return
    earlier = getattr(model, "_kept_on_reset", [])
    model._kept_on_reset = [*earlier, *at_head]  # type: ignore[assignment]
    # a partial, and not a closure, so that copies and pickles reset themselves
    model.reset_classifier = partial(_reset_classifier, model)  # type: ignore[assignment]


def _reset_classifier(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    own: Any = type(model)
    before = set(model.modules())
    own.reset_classifier(model, *args, **kwargs)
    taken_away = before - set(model.modules())
    kept: list[Placed] = model._kept_on_reset  # type: ignore[assignment]
    for slot, layer in kept:
        if layer in taken_away:
            insert(model, slot, layer)
