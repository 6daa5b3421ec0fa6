"""DropBlock (Ghiasi, Lin & Le, 2018, arXiv:1810.12890): drop square blocks of the maps."""

from __future__ import annotations

import torch
from torch import Tensor

from timm_structdrop.layers._base import StructDropLayer, check_drop_prob
from timm_structdrop.layers._blocks import clamp_block, grow_blocks
from timm_structdrop.layers._mask import apply_mask
from timm_structdrop.layers._rate import check_block_size, paper_rate, seed_rate, seed_rate_tensor
from timm_structdrop.layers._registry import register
from timm_structdrop.layers._sparse import drop_sparse_blocks

__all__ = ["DropBlock2d", "drop_block_2d"]

# the sparse path writes each block, so where blocks overlap heavily the dense one is the faster:
# about equal at 2 to 3 writes per unit of the map (p of 0.8 to 0.9)
MAX_WRITES = 2.0


def drop_block_2d(
    x: Tensor,
    drop_prob: float | Tensor = 0.1,
    block_size: int = 7,
    gamma: str = "exact",
    couple_channels: bool = False,
    gamma_scale: float = 1.0,
    training: bool = True,
) -> Tensor:
    """Algorithm 1 of the paper: zero blocks, multiply what is kept by count(M) / count_ones(M).

    Seeds are drawn independently, at rate gamma, wherever the whole block fits in the map.

    Args:
        x: activations (B, C, H, W).
        drop_prob: p, the expected fraction of units dropped, in [0, 1). A 0-d tensor, which is not
            checked, keeps ``torch.compile`` from specialising on it.
        block_size: side of the blocks; clamped to H and to W.
        gamma: ``"exact"``: the seed rate that drops exactly p in expectation; ``"paper"``: Eq. (1),
            which drops less because blocks overlap.
        couple_channels: one mask per sample instead of one per sample and channel.
        gamma_scale: multiplies gamma, in (0, 1]; the paper takes 1/4 in group 3.
        training: if False, ``x`` is returned.

    Returns:
        (B, C, H, W) in the dtype and memory format of ``x``; ``x`` itself if p is the float 0.

    Raises:
        ValueError: a setting is out of range or ``x`` is not (B, C, H, W).
    """
    check_block_size(block_size)
    _check_gamma(gamma, gamma_scale)
    if x.ndim != 4:
        raise ValueError(f"x must be (B, C, H, W); got {tuple(x.shape)}")
    if not isinstance(drop_prob, Tensor):
        drop_prob = check_drop_prob(drop_prob)
        if drop_prob == 0.0:
            return x
        if torch.compiler.is_compiling():
            drop_prob = torch.full((), drop_prob, device=x.device, dtype=torch.float32)
    if not training:
        return x
    size = (x.shape[2], x.shape[3])
    block = clamp_block(block_size, size)
    rate: float | Tensor
    if gamma == "paper":
        rate = paper_rate(drop_prob, size, block_size)
    elif isinstance(drop_prob, Tensor):
        rate = seed_rate_tensor(drop_prob, size, block_size)
    else:
        rate = seed_rate(drop_prob, size, block_size)
    rate = rate * gamma_scale
    if not couple_channels and isinstance(rate, float) and _is_sparse(x, block, rate):
        return drop_sparse_blocks(x, block, rate)
    return drop_dense_blocks(x, block, rate, couple_channels)


def drop_dense_blocks(
    x: Tensor, block: tuple[int, int], rate: float | Tensor, couple_channels: bool = False
) -> Tensor:
    """DropBlock at a seed rate with no data-dependent shapes and no synchronisation.

    Args:
        x: activations (B, C, H, W).
        block: (rows, columns) of the blocks, at most (H, W).
        rate: the seed rate, a float or a 0-d tensor in [0, 1].
        couple_channels: one mask per sample instead of one per sample and channel.

    Returns:
        ``x * M * count(M) / count_ones(M)``, M zero in the blocks.
    """
    batch, channels, height, width = x.shape
    shape = (
        batch,
        1 if couple_channels else channels,
        height - block[0] + 1,
        width - block[1] + 1,
    )
    # float32 whatever the activations: a float16 uniform would round rates of 1e-3 by 5 %
    drawn = torch.rand(shape, device=x.device, dtype=torch.float32) < rate
    return apply_mask(x, ~grow_blocks(drawn, block))


def _is_sparse(x: Tensor, block: tuple[int, int], rate: float) -> bool:
    """Whether the path of few seeds can run and is worth it."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    if type(x) not in (Tensor, torch.nn.Parameter):  # e.g. fake tensors have no data to depend on
        return False
    fits = (x.shape[2] - block[0] + 1) * (x.shape[3] - block[1] + 1)
    writes = rate * fits * block[0] * block[1]
    return writes <= MAX_WRITES * x.shape[2] * x.shape[3]


def _check_gamma(gamma: str, gamma_scale: float) -> None:
    if gamma not in ("exact", "paper"):
        raise ValueError(f"gamma must be 'exact' or 'paper'; got {gamma!r}")
    if not 0.0 < gamma_scale <= 1.0:
        raise ValueError(f"gamma_scale must be in (0, 1]; got {gamma_scale}")


@register(
    "dropblock",
    summary="drops square blocks at seeds drawn independently per sample and channel",
    paper="Ghiasi et al. 2018, arXiv:1810.12890",
)
class DropBlock2d(StructDropLayer):
    """DropBlock: see :func:`drop_block_2d`.

    Args:
        drop_prob: expected fraction of units dropped, in [0, 1).
        block_size: side of the blocks; clamped to the map.
        gamma: ``"exact"`` or ``"paper"`` (Eq. 1).
        couple_channels: one mask per sample instead of one per sample and channel.
        gamma_scale: multiplies gamma, in (0, 1]; the paper takes 1/4 in group 3.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        drop_prob: float = 0.1,
        block_size: int = 7,
        gamma: str = "exact",
        couple_channels: bool = False,
        gamma_scale: float = 1.0,
    ) -> None:
        super().__init__(drop_prob)
        _check_gamma(gamma, gamma_scale)
        self.block_size = check_block_size(block_size)
        self.gamma = gamma
        self.couple_channels = couple_channels
        self.gamma_scale = gamma_scale

    def forward(self, x: Tensor) -> Tensor:
        if self.is_off():
            return x
        return drop_block_2d(
            x,
            self.live_rate(),
            self.block_size,
            self.gamma,
            self.couple_channels,
            self.gamma_scale,
        )
