"""The registry of regularizers: a plain dict that every other room reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from timm_structdrop.layers._base import StructDropLayer

__all__ = ["Regularizer", "register", "regularizers"]


@dataclass(frozen=True)
class Regularizer:
    """One entry of :data:`regularizers`.

    Attributes:
        name: the name users write, and the suffix of the registered models.
        layer: the layer class.
        summary: one line for tables.
        paper: where it comes from.
    """

    name: str
    layer: type[StructDropLayer]
    summary: str
    paper: str


regularizers: dict[str, Regularizer] = {}

LayerT = TypeVar("LayerT", bound="type[StructDropLayer]")


def register(name: str, *, summary: str, paper: str) -> Callable[[LayerT], LayerT]:
    """Class decorator that enters a layer into :data:`regularizers`.

    Args:
        name: the name users write; lower-case letters and digits.
        summary: one line for tables.
        paper: where it comes from.

    Raises:
        ValueError: the name is taken or is not a lower-case identifier.
    """
    if name in regularizers:
        raise ValueError(f"a regularizer's name must be unique; {name!r} is already registered")
    if not name.isidentifier() or name != name.lower() or "_" in name:
        raise ValueError(
            f"a regularizer's name must be lower-case letters and digits; got {name!r}"
        )

    def enter(layer: LayerT) -> LayerT:
        regularizers[name] = Regularizer(name, layer, summary, paper)
        layer.regularizer = name
        return layer

    return enter
