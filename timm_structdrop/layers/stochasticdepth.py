"""StochasticDepth (Huang et al., 2016, arXiv:1603.09382): drop residual branches."""

from __future__ import annotations

from torch import Tensor

from timm_structdrop.layers.base import Paper, Placement, StructDropLayer, register
from timm_structdrop.layers.blocks import drop_alike

__all__ = ["StochasticDepth", "stochastic_depth"]


def stochastic_depth(x: Tensor, drop_prob: float | Tensor = 0.1, training: bool = True) -> Tensor:
    """Zero a sample's residual branch with probability p, divide it by 1 - p otherwise.

    This is what timm's DropPath does: each sample loses the branch on its own, and the scaling
    happens in training. In the paper the samples of a batch lose it together and inference scales.

    Args:
        x: output of a residual branch, before the skip is added, (B, ...).
        drop_prob: p in [0, 1). A 0-d tensor, which is not checked, keeps ``torch.compile`` from
            specialising on it.
        training: if False, ``x`` is returned.

    Returns:
        The shape, dtype and memory format of ``x``.

    Raises:
        ValueError: p is a float outside [0, 1).
    """
    return drop_alike(x, 1, drop_prob, training)


@register(
    "stochasticdepth",
    summary="drops residual branches, sample by sample",
    paper=Paper.with_bibtex(
        "Huang et al. 2016, arXiv:1603.09382",
        "Stochastic Depth",
        "Deep Networks with Stochastic Depth",
        "https://arxiv.org/abs/1603.09382",
        "inproceedings",
        "huang2016stochasticdepth",
        author="Huang, Gao and Sun, Yu and Liu, Zhuang and Sedra, Daniel and Weinberger, Kilian Q.",
        booktitle="European Conference on Computer Vision",
        year="2016",
    ),
    placement=Placement(where=("last_conv",), last_stages=0, note="one rate for all"),
    residual_only=True,
)
class StochasticDepth(StructDropLayer):
    """StochasticDepth on one residual branch: see :func:`stochastic_depth`.

    Whether all branches have one rate (DropCluster's tables) or a rate that grows with depth
    (timm's linear rule) is for whoever places the layers to say.

    Args:
        drop_prob: probability of dropping a sample's branch, in [0, 1).

    Raises:
        ValueError: ``drop_prob`` is out of range.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x if self.is_off() else stochastic_depth(x, self.live_rate())
