"""Dropout (Srivastava et al., 2014, JMLR 15) on feature maps: drop single units."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from timm_structdrop.layers.base import Paper, Placement, StructDropLayer, check_drop_prob, register
from timm_structdrop.layers.blocks import drop_alike

__all__ = ["UnitDropout2d", "unit_dropout_2d"]


def unit_dropout_2d(x: Tensor, drop_prob: float | Tensor = 0.1, training: bool = True) -> Tensor:
    """Zero each unit with probability p, divide the others by 1 - p.

    On 1x1 maps this and SpatialDropout are one method.

    Args:
        x: activations (B, C, H, W).
        drop_prob: p in [0, 1). A 0-d tensor, which is not checked, keeps ``torch.compile`` from
            specialising on it.
        training: if False, ``x`` is returned.

    Returns:
        (B, C, H, W) in the dtype and memory format of ``x``.

    Raises:
        ValueError: p is a float outside [0, 1).
    """
    if isinstance(drop_prob, Tensor):
        return drop_alike(x, x.ndim, drop_prob, training)
    drop_prob = check_drop_prob(drop_prob)
    return F.dropout(x, drop_prob) if training else x


@register(
    "dropout",
    summary="drops single units",
    paper=Paper.with_bibtex(
        "Srivastava et al. 2014, JMLR 15:1929-1958",
        "Dropout",
        "Dropout: A Simple Way to Prevent Neural Networks from Overfitting",
        "https://jmlr.org/papers/v15/srivastava14a.html",
        "article",
        "srivastava2014dropout",
        author="Srivastava, Nitish and Hinton, Geoffrey and Krizhevsky, Alex and Sutskever, Ilya "
        "and Salakhutdinov, Ruslan",
        journal="Journal of Machine Learning Research",
        volume="15",
        pages="1929--1958",
        year="2014",
    ),
    placement=Placement(where=("conv", "last_conv")),
)
class UnitDropout2d(StructDropLayer):
    """Dropout of the units of a map: see :func:`unit_dropout_2d`.

    Args:
        drop_prob: probability of dropping a unit, in [0, 1).

    Raises:
        ValueError: ``drop_prob`` is out of range.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x if self.is_off() else unit_dropout_2d(x, self.live_rate())
