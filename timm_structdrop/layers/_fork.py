"""Forked activations: one batch that goes through two sub models of one network at once."""

from __future__ import annotations

import torch
from torch import Tensor

from timm_structdrop.layers._step import StepAware
from timm_structdrop.layers._tell import tell

__all__ = ["Fork", "halves"]

WITHOUT_TASK = (
    "an R-Block model is trained without its task: the batch is not forked, and each sample goes "
    "through one random sub model in every layer; train it with timm_structdrop.training.RBlockTask"
)


class Fork(StepAware):
    """Where a batch is forked: (B, ...) to (2B, ...), the batch twice, sub model by sub model.

    It forks in training and only in a step whose task asks for it; otherwise it is the identity. It
    has neither parameters nor buffers. Trained without such a task it warns, once (and once for
    each graph of ``torch.compile``): the R-Block layers behind it then act as single sub models.
    """

    _warned: bool = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.current_step().forked:
            return torch.cat((x, x))
        if torch.compiler.is_compiling():
            tell(WITHOUT_TASK)
        elif not self._warned:
            self._warned = True
            tell(WITHOUT_TASK)
        return x


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two sub models' halves of a forked batch.

    Args:
        x: (2B, ...), sub model 1's samples first.

    Returns:
        (B, ...) twice.

    Raises:
        ValueError: the batch is odd.
    """
    if len(x) % 2:
        raise ValueError(
            f"a forked batch holds two sub models' samples, an even number; got {len(x)}"
        )
    first, second = x.chunk(2)
    return first, second
