"""DropBlock switched on at inference (its paper's Fig. 5): how much a model leans on one part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from timm_structdrop.errors import UserError
from timm_structdrop.layers import DropBlock2d
from timm_structdrop.models.placement import where_in_words
from timm_structdrop.models.structdrop_attached import attach

__all__ = ["InferenceDrop", "dropblock_layers", "dropping", "with_dropblock"]

GAMMAS = ("exact", "paper")


@dataclass(frozen=True)
class InferenceDrop:
    """One setting of DropBlock at inference.

    Attributes:
        block_size: side of the blocks, at least 1; 1 drops single units.
        keep_prob: fraction of units kept, in (0, 1]; the expected one where gamma is exact.
        gamma: the seed rate, see :func:`timm_structdrop.layers.drop_block_2d`: ``"exact"`` keeps
            what ``keep_prob`` says, at every block size alike; ``"paper"``, Eq. (1), keeps more of
            large blocks, as in the training of a model with ``gamma="paper"``.

    Raises:
        UserError: a setting is out of range.
    """

    block_size: int
    keep_prob: float
    gamma: str = "exact"

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise UserError(f"block must be an integer of at least 1; got {self.block_size}")
        if not 0.0 < self.keep_prob <= 1.0:
            raise UserError(f"keep must be a probability in (0, 1]; got {self.keep_prob}")
        if self.gamma not in GAMMAS:
            raise UserError(f"gamma must be {' or '.join(GAMMAS)}; got {self.gamma}")

    @classmethod
    def parse(cls, text: str) -> InferenceDrop:
        """``block=7,keep=0.9`` or ``block=7,keep=0.9,gamma=paper``, in any order.

        Raises:
            UserError: it is not of that form, or a value is out of range.
        """
        pairs = [part.partition("=") for part in text.split(",")]
        values = {name.strip(): value.strip() for name, _, value in pairs}
        try:
            if sorted({*values, "gamma"}) != ["block", "gamma", "keep"] or len(pairs) > len(values):
                raise ValueError
            block_size, keep_prob = int(values["block"]), float(values["keep"])
        except (KeyError, ValueError):
            raise UserError(
                f"it must be block=SIZE,keep=PROBABILITY[,gamma=paper]; got {text!r}"
            ) from None
        return cls(block_size, keep_prob, values.get("gamma", "exact"))


def dropblock_layers(model: nn.Module) -> list[DropBlock2d]:
    """The DropBlock layers of a model."""
    return [module for module in model.modules() if isinstance(module, DropBlock2d)]


def with_dropblock(model: nn.Module, img_size: tuple[int, int]) -> str:
    """Attach DropBlock at its default places unless the model has it; says in words what is there.

    Args:
        model: changed in place; its output in eval mode stays as it is.
        img_size: (H, W) of the images.

    Raises:
        UserError: the model has no place for DropBlock.
    """
    own = len(dropblock_layers(model))
    if own:
        return f"the model's own DropBlock layers ({own})"
    try:
        attach(model, "dropblock", img_size=img_size)
    except ValueError as error:
        raise UserError(
            "dropping at inference needs a model with DropBlock layers or with places for them; "
            f"{type(model).__name__} has neither: {error}"
        ) from error
    count = len(dropblock_layers(model))
    where = where_in_words(model, "dropblock")
    return f"DropBlock layers attached at their default places ({count}): {where}"


@contextmanager
def dropping(model: nn.Module, drop: InferenceDrop) -> Iterator[Sequence[DropBlock2d]]:
    """DropBlock layers of ``model`` with the settings of ``drop``, to be kept active.

    Other settings of the layers stay: where the placement divides gamma (DropBlock's group 3), it
    does so here. On exit all settings are as before.

    Raises:
        UserError: the model has no DropBlock layer.
    """
    layers = dropblock_layers(model)
    if not layers:
        raise UserError(
            f"dropping at inference needs DropBlock layers; {type(model).__name__} has none"
        )
    before = [
        (layer.block_size, layer.gamma, layer.target_drop_prob, layer.rate()) for layer in layers
    ]
    try:
        for layer in layers:
            layer.block_size, layer.gamma = drop.block_size, drop.gamma
            layer.set_drop_prob(round(1.0 - drop.keep_prob, 12))
        yield layers
    finally:
        for layer, (block_size, gamma, target, rate) in zip(layers, before, strict=True):
            layer.block_size, layer.gamma = block_size, gamma
            layer.set_drop_prob(target)
            layer.scale_drop_prob(rate / target if target else 1.0)
