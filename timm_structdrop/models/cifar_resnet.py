"""ResNets for small images: He et al.'s CIFAR family, and timm's ResNets with a CIFAR stem."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from timm_structdrop.errors import UserError
from timm_structdrop.models._staged import StagedNet
from timm_structdrop.models.architectures import register_architecture, small_cfg

__all__ = ["CifarResNet", "CifarStemResNet", "OptionAShortcut", "option_a_shortcut"]


def option_a_shortcut(x: Tensor, out_channels: int, stride: int) -> Tensor:
    """He et al. (2015), Section 3.3, option (A): a shortcut without parameters.

        y[b, c, i, j] = x[b, c, stride * i, stride * j]  for c < C,  0 for C <= c < out_channels

    The paper does not say where the zero channels go; here they come last.

    Args:
        x: (B, C, H, W), C <= out_channels.

    Returns:
        (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """
    x = x[:, :, ::stride, ::stride]
    return F.pad(x, (0, 0, 0, 0, 0, out_channels - x.shape[1]))


class OptionAShortcut(nn.Module):
    """:func:`option_a_shortcut` as a module; it has neither parameters nor state.

    Raises:
        ValueError: fewer channels come out than go in.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(
                f"out_channels must be at least in_channels = {in_channels}; got {out_channels}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return option_a_shortcut(x, self.out_channels, self.stride)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


class CifarResNet(StagedNet):
    """He et al. (2015), Section 4.2: a 3x3 convolution, then three groups of n basic blocks.

    The blocks are timm's `BasicBlock`, so parameter names are those of timm's ResNet. The first
    block of groups 2 and 3 halves the map; its `downsample` is an `nn.Sequential` that holds an
    :class:`OptionAShortcut`, and other layers may be appended to it. Stochastic depth follows
    timm's linear rule: block i of N is dropped with probability drop_path_rate * i / (N - 1).

    Args:
        depth: 6n + 2, n >= 1: the layers with weights, counted as the paper does.
        global_pool: timm's pooling type; `""` for none.
        widths: channels of the three groups, never fewer than in the group before.
        drop_rate: dropout before the classifier, in [0, 1].
        drop_path_rate: stochastic depth of the last block, in [0, 1].
        zero_init_last: residual blocks start as their shortcut (timm's habit, not the paper's).

    Raises:
        UserError: `depth` is not of this form.
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        widths: tuple[int, int, int] = (16, 32, 64),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise UserError(f"depth must be 6n + 2 with n >= 1; got {depth}")
        super().__init__(num_classes, in_chans, drop_rate)
        dd = {"device": device, "dtype": dtype}
        per_group = (depth - 2) // 6
        rates = [drop_path_rate * i / (3 * per_group - 1) for i in range(3 * per_group)]

        channels = widths[0]
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(channels, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.add_feature("act1", channels, 1)
        for group, width in enumerate(widths):
            blocks: list[nn.Module] = []
            for rate in rates[group * per_group : (group + 1) * per_group]:
                stride = 2 if group and not blocks else 1
                same = stride == 1 and channels == width
                blocks.append(
                    BasicBlock(
                        channels,
                        width,
                        stride,
                        None if same else nn.Sequential(OptionAShortcut(channels, width, stride)),
                        drop_path=DropPath(rate) if rate else None,
                        **dd,
                    )
                )
                channels = width
            self.add_stage(blocks, width, 2**group)
        self.add_head(channels, global_pool, zero_init_last=zero_init_last, **dd)


class CifarStemResNet(ResNet):
    """timm's ResNet for 32 x 32 images: `conv1` is 3x3 with stride 1, `maxpool` does nothing.

    Every other name and shape is timm's, so all of timm's weights but `conv1` fit. R-Block's paper
    says that it changes "the first convolutional layer" only, which leaves the max-pool in its
    place: `stem_pool`. Most of the literature takes both out, as is done here without it.

    Args:
        block: timm's `BasicBlock` or `Bottleneck`.
        layers: blocks in each of the four groups.
        stem_pool: keep timm's 3x3 max-pool with stride 2, which halves all maps behind the stem.
        **kwargs: keywords of timm's ResNet, except those of its stem.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: tuple[int, ...],
        num_classes: int = 10,
        in_chans: int = 3,
        stem_pool: bool = False,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            block,
            layers,
            num_classes=num_classes,
            in_chans=in_chans,
            stem_type="",
            replace_stem_pool=False,
            **kwargs,
            **dd,
        )
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False, **dd)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if not stem_pool:
            self.maxpool = nn.Identity()
        for feature in self.feature_info:
            feature["reduction"] = max(1, feature["reduction"] // (2 if stem_pool else 4))


for _depth in (8, 14, 20, 32, 44, 56, 110):
    register_architecture(
        f"resnet{_depth}",
        partial(CifarResNet, depth=_depth),
        cfg=small_cfg((8, 8), paper_ids="arXiv:1512.03385"),
        summary=f"He et al.'s CIFAR ResNet-{_depth}: widths 16/32/64, parameter-free shortcuts",
        out_indices=(0, 1, 2, 3),
        placements={"camdrop": {"stages": (1, 2, 3), "block_size": 8}},
        residual=True,
    )

for _depth, _block, _layers in (
    (18, BasicBlock, (2, 2, 2, 2)),
    (34, BasicBlock, (3, 4, 6, 3)),
    (50, Bottleneck, (3, 4, 6, 3)),
):
    register_architecture(
        f"resnet{_depth}_cifar",
        partial(CifarStemResNet, block=_block, layers=_layers),
        cfg=small_cfg((4, 4), paper_ids="arXiv:1512.03385"),
        summary=f"ResNet-{_depth} with a 3x3 stride-1 stem and, unless stem_pool, no max-pool",
        residual=True,
    )
