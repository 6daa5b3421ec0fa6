"""VGG-16 for 32 x 32 images."""

from __future__ import annotations

from typing import Any

from torch import nn

from timm_structdrop.models._plain_chain import PlainChain, conv_block, max_pool
from timm_structdrop.models.architectures import register_architecture, small_cfg

__all__ = ["CifarVGG"]


class CifarVGG(PlainChain):
    """Simonyan & Zisserman (2014), configuration D, with batch norm and one linear layer as head.

    Thirteen 3x3 convolutions in five groups, each followed by a max-pool. The first convolution is
    the stem (`conv1`, `bn1`, `act1`), as in a ResNet; `layer1` ... `layer5` are the groups, each
    after the first beginning with the pool that separates it from the one before; `pool` ends the
    chain. Blocks are `layer<group>.<i>` with `conv1`, `bn1` and `act1`. The pools round up, so
    inputs of any size work; at multiples of 32 this changes nothing.

    Args:
        widths: channels of the convolutions, a tuple for each group.
        global_pool: timm's pooling type; `""` for none.
        num_classes, in_chans, drop_rate, drop_path_rate: see
            :class:`~timm_structdrop.models._plain_chain.PlainChain`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        widths: tuple[tuple[int, ...], ...] = (
            (64,) * 2,
            (128,) * 2,
            (256,) * 3,
            *[(512,) * 3] * 2,
        ),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, drop_path_rate)
        dd = {"device": device, "dtype": dtype}
        channels = widths[0][0]
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(channels, **dd)
        self.act1 = nn.ReLU(inplace=True)
        for group, group_widths in enumerate(widths):
            blocks: list[nn.Module] = []
            for width in group_widths if group else group_widths[1:]:
                before = [("pool", max_pool())] if group and not blocks else []
                blocks.append(
                    conv_block(channels, width, 3, padding=1, norm=True, before=before, **dd)
                )
                channels = width
            self.add_stage(blocks, channels, 2**group)
        self.pool = max_pool()
        self.add_feature("pool", channels, 2 ** len(widths))
        self.add_head(channels, global_pool, **dd)


register_architecture(
    "vgg16_cifar",
    CifarVGG,
    cfg=small_cfg((1, 1), paper_ids="arXiv:1409.1556"),
    summary="VGG-16 with batch norm and one linear layer as head",
    out_indices=(0, 1, 2, 3, 4, 5),
)
