"""LeNet-5."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_structdrop.models._plain_chain import PlainChain, conv_block, max_pool
from timm_structdrop.models.architectures import register_architecture, small_cfg

__all__ = ["LeNet5"]


@register_notrace_module
class PadToAtLeast(nn.Module):
    """Zeros below and to the right of a map smaller than `size` x `size`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return F.pad(x, (0, max(0, self.size - width), 0, max(0, self.size - height)))

    def extra_repr(self) -> str:
        return f"{self.size}"


class LeNet5(PlainChain):
    """LeCun et al. (1998), Section II.B, with ReLU, max-pooling and a linear classifier.

    C1 (6 maps), S2, C3 (16 maps, each reading all six), S4, C5 (120), F6 (84), classes. C5 is a
    5x5 convolution, as in the paper, and F6 a 1x1 convolution: at 32 x 32 both have a single
    position and are the usual fully connected layers; on a larger input they slide over the map
    (the paper's space displacement network, Section VII) and `global_pool` averages the positions.
    Where S4 is smaller than C5's 5x5 window (inputs under 32), it is padded with zeros; the
    smallest input is 13 x 13. The paper pads 28 x 28 digits to 32 x 32: do so to reproduce it.

    The chain is `conv1`, `act1` (C1), `layer1` (S2, C3), `layer2` (S4, C5, F6).

    Args:
        global_pool: timm's pooling type; `""` for none.
        num_classes, in_chans, drop_rate, drop_path_rate: see
            :class:`~timm_structdrop.models._plain_chain.PlainChain`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, drop_path_rate)
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, 6, 5, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.add_feature("act1", 6, 1)
        self.add_stage([conv_block(6, 16, 5, before=[("pool", max_pool())], **dd)], 16, 2)
        before_c5 = [("pool", max_pool()), ("pad", PadToAtLeast(5))]
        fully_connected = [
            conv_block(16, 120, 5, before=before_c5, **dd),
            conv_block(120, 84, 1, **dd),
        ]
        self.add_stage(fully_connected, 84, 4)
        # There is no batch norm to mend the scale of the activations.
        self.add_head(84, global_pool, init_mode="fan_in", **dd)


register_architecture(
    "lenet5",
    LeNet5,
    cfg=small_cfg(
        (1, 1), input_size=(1, 32, 32), min_input_size=(1, 16, 16), mean=(0.1307,), std=(0.3081,)
    ),
    summary="LeCun et al.'s LeNet-5 with ReLU and max-pooling",
    out_indices=(0, 1, 2),
)
