"""SpatialDropout (Tompson et al., 2015, arXiv:1411.4280): drop whole channels."""

from __future__ import annotations

from torch import Tensor

from timm_structdrop.layers.base import Paper, Placement, StructDropLayer, check_maps, register
from timm_structdrop.layers.blocks import drop_alike

__all__ = ["SpatialDropout2d", "spatial_dropout_2d"]


def spatial_dropout_2d(x: Tensor, drop_prob: float | Tensor = 0.1, training: bool = True) -> Tensor:
    """Zero each channel of each sample with probability p, divide the others by 1 - p.

    On 1x1 maps this and the dropout of units are one method.

    Args:
        x: activations (B, C, H, W).
        drop_prob: p in [0, 1). A 0-d tensor, which is not checked, keeps ``torch.compile`` from
            specialising on it.
        training: if False, ``x`` is returned.

    Returns:
        (B, C, H, W) in the dtype and memory format of ``x``.

    Raises:
        ValueError: p is a float outside [0, 1), or ``x`` is not of four dimensions.
    """
    check_maps(x)
    return drop_alike(x, 2, drop_prob, training)


@register(
    "spatialdropout",
    summary="drops whole channels",
    paper=Paper.with_bibtex(
        "Tompson et al. 2015, arXiv:1411.4280",
        "SpatialDropout",
        "Efficient Object Localization Using Convolutional Networks",
        "https://arxiv.org/abs/1411.4280",
        "inproceedings",
        "tompson2015spatialdropout",
        author="Tompson, Jonathan and Goroshin, Ross and Jain, Arjun and LeCun, Yann and "
        "Bregler, Christoph",
        booktitle="IEEE Conference on Computer Vision and Pattern Recognition",
        year="2015",
    ),
    placement=Placement(where=("conv", "last_conv")),
)
class SpatialDropout2d(StructDropLayer):
    """SpatialDropout: see :func:`spatial_dropout_2d`.

    Args:
        drop_prob: probability of dropping a channel of a sample, in [0, 1).

    Raises:
        ValueError: ``drop_prob`` is out of range.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x if self.is_off() else spatial_dropout_2d(x, self.live_rate())
