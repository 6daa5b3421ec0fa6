"""Schedules of the drop rate: pure functions of the update index."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import nn

from timm_structdrop.errors import UserError, nearest
from timm_structdrop.layers import StructDropLayer
from timm_structdrop.models.placement import structdrop_layers

__all__ = ["DropSchedule", "live_drop_prob", "schedule_shapes"]


def live_drop_prob(layers: Iterable[StructDropLayer]) -> float | None:
    """The mean of the layers' live rates; None without layers."""
    rates = [layer.rate() for layer in layers]
    return sum(rates) / len(rates) if rates else None


schedule_shapes: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: t,
    "delayed": lambda t: 1.0,
    "inverse": lambda t: 1.0 - t,
    "v": lambda t: abs(1.0 - 2.0 * t),
    "cosine": lambda t: 0.5 * (1.0 - math.cos(math.pi * t)),
}


class DropSchedule:
    """Moves the live rate of every structured layer: rate(u) = factor(u) * target rate.

    The factor depends on nothing but the update index u, so a resumed run continues at the right
    rate, and every layer keeps its own target, so groups with different rates move together. With
    t = clamp((u - start_update) / (total_updates - start_update), 0, 1) the shapes are

    - ``constant``: 1.
    - ``linear``: t; DropBlock's scheme, keep_prob from 1 down to its target.
    - ``delayed``: 0 for u < start_update, then 1; DropCluster's "nothing before epoch 50".
    - ``inverse``: 1 - t; CamDrop's Table 5, gamma from its target up to 1.
    - ``v``: abs(1 - 2 t), from 1 down to 0 half-way and back; CamDrop's authors' code.
    - ``cosine``: (1 - cos(pi t)) / 2; linear with flat ends.

    Args:
        model_or_layers: a model, of which every structured layer is driven, or the layers.
        shape: a key of ``schedule_shapes``.
        total_updates: optimizer updates of the whole training, at least 1.
        start_update: the update at which the shape begins, in [0, total_updates); before it the
            factor is what it is at the start (0 for linear, delayed and cosine, else 1).

    Raises:
        UserError: an argument out of its range, or there is no structured layer.
    """

    def __init__(
        self,
        model_or_layers: nn.Module | Iterable[StructDropLayer],
        shape: str = "constant",
        *,
        total_updates: int,
        start_update: int = 0,
    ) -> None:
        if shape not in schedule_shapes:
            raise UserError(
                f"a drop schedule's shape must be one of {', '.join(schedule_shapes)}; "
                f"got {shape!r}{nearest(str(shape), schedule_shapes, n=1)}"
            )
        if total_updates < 1:
            raise UserError(f"total_updates must be at least 1; got {total_updates}")
        if not 0 <= start_update < total_updates:
            raise UserError(
                f"start_update must be in [0, total_updates = {total_updates}); got {start_update}"
            )
        if isinstance(model_or_layers, nn.Module):
            model_or_layers = structdrop_layers(model_or_layers)
        self.layers = list(model_or_layers)
        if not self.layers:
            raise UserError("a drop schedule needs a model with structured layers; got none")
        self.shape = shape
        self.total_updates = total_updates
        self.start_update = start_update

    def factor(self, update: int) -> float:
        """What the target rates are multiplied by at ``update``, in [0, 1].

        Raises:
            UserError: ``update`` is negative.
        """
        if update < 0:
            raise UserError(f"update must be at least 0; got {update}")
        if self.shape == "delayed" and update < self.start_update:
            return 0.0
        t = (update - self.start_update) / (self.total_updates - self.start_update)
        return schedule_shapes[self.shape](min(max(t, 0.0), 1.0))

    def step(self, update: int) -> float:
        """Set every layer's live rate for ``update``; returns the factor."""
        factor = self.factor(update)
        for layer in self.layers:
            layer.scale_drop_prob(factor)
        return factor

    def __repr__(self) -> str:
        return (
            f"DropSchedule(layers={len(self.layers)}, shape={self.shape!r}, "
            f"total_updates={self.total_updates}, start_update={self.start_update})"
        )
