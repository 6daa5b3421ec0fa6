"""What the small architectures without residual branches share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from timm_structdrop.errors import UserError
from timm_structdrop.models._staged import StagedNet

__all__ = ["PlainChain", "conv_block", "max_pool"]


class PlainChain(StagedNet):
    """A chain of convolutions and poolings.

    Args:
        num_classes: width of the classifier; 0 for none.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier, in [0, 1].
        drop_path_rate: 0, as without residual branches a dropped path is a dropped image.

    Raises:
        UserError: `drop_path_rate` is not 0.
    """

    def __init__(
        self, num_classes: int, in_chans: int, drop_rate: float, drop_path_rate: float
    ) -> None:
        if drop_path_rate:
            raise UserError(
                "drop_path_rate must be 0 in an architecture without residual branches; "
                f"got {drop_path_rate}"
            )
        super().__init__(num_classes, in_chans, drop_rate)


def conv_block(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    padding: int = 0,
    norm: bool = False,
    before: Sequence[tuple[str, nn.Module]] = (),
    **dd: Any,
) -> nn.Sequential:
    """A convolution with its activation, named as in a residual block: `conv1`, `bn1`, `act1`.

    Args:
        norm: with a batch norm, which then stands in for the convolution's bias.
        before: named modules that come first, such as the pooling between two stages.
        **dd: `device` and `dtype`.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(before)
    layers["conv1"] = nn.Conv2d(
        in_channels, out_channels, kernel_size, padding=padding, bias=not norm, **dd
    )
    if norm:
        layers["bn1"] = nn.BatchNorm2d(out_channels, **dd)
    layers["act1"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def max_pool() -> nn.MaxPool2d:
    """2 x 2 max-pooling that keeps the odd last row and column, so that no map vanishes."""
    return nn.MaxPool2d(2, ceil_mode=True)
