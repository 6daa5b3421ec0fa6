"""DropBlock (Ghiasi, Lin & Le, 2018, arXiv:1810.12890): drop square blocks of the maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from timm_structdrop.layers._base import StructDropLayer
from timm_structdrop.layers._blocks import clamp_block, grow_blocks
from timm_structdrop.layers._check import (
    check_choice,
    check_drop_prob,
    check_fraction,
    check_integer,
    check_maps,
)
from timm_structdrop.layers._mask import apply_mask
from timm_structdrop.layers._rate import paper_rate, seed_rate, seed_rate_tensor
from timm_structdrop.layers._registry import register
from timm_structdrop.layers._sparse import drop_sparse_blocks, may_look_at_data

__all__ = ["DropBlock2d", "drop_block_2d"]

# the sparse path writes each block, so where blocks overlap heavily the dense one is the faster:
# about equal at 2 to 3 writes per unit of the map (p of 0.8 to 0.9)
MAX_WRITES = 2.0
# a loop over more blocks than these costs more than growing them
MAX_LOOPED = 4.0


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
    check_maps(x)
    size = (x.shape[2], x.shape[3])
    if isinstance(drop_prob, Tensor) or torch.compiler.is_compiling():
        block_size = check_integer("block_size", block_size)
        rate = _rate_in_graph(drop_prob, size, block_size, gamma, gamma_scale, x.device)
        block = clamp_block(block_size, size)
        return drop_dense_blocks(x, block, rate, couple_channels) if training else x
    try:
        plan = _known_plan(drop_prob, size, block_size, gamma, gamma_scale, couple_channels)
    except TypeError:  # an argument that cannot be looked up: an array of numpy, or a mistake
        plan = _plan(drop_prob, size, block_size, gamma, gamma_scale, couple_channels)
    if not training or plan.rate == 0.0:
        return x
    if plan.quick is not None and may_look_at_data(x):
        return plan.quick(x, plan.block, plan.rate)
    return drop_dense_blocks(x, plan.block, plan.rate, couple_channels)


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
    shape = (batch, 1 if couple_channels else channels, *_places((height, width), block))
    # float32 whatever the activations: a float16 uniform would round rates of 1e-3 by 5 %
    drawn = torch.rand(shape, device=x.device, dtype=torch.float32) < rate
    return apply_mask(x, ~grow_blocks(drawn, block))


def drop_shared_blocks(x: Tensor, block: tuple[int, int], rate: float) -> Tensor:
    """DropBlock of a CPU tensor, one mask per sample, in as few tensor operations as there can be.

    A mask that the channels share is tiny, so what it costs is the number of operations, not the
    work in them: the few blocks are written in a Python loop.

    Args:
        x: activations (B, C, H, W).
        block: (rows, columns) of the blocks, at most (H, W).
        rate: the seed rate, in [0, 1].

    Returns:
        ``x * M * count(M) / count_ones(M)``, M (B, 1, H, W) zero in the blocks.
    """
    batch, _, height, width = x.shape
    places = _places((height, width), block)
    drawn = torch.rand(batch, *places, dtype=torch.float32, device="cpu").numpy() < rate
    mask = torch.ones(batch, 1, height, width, dtype=torch.float32, device="cpu")
    units = mask.numpy()  # the same memory: numpy's small operations are the faster
    for sample, row, column in zip(*(index.tolist() for index in drawn.nonzero()), strict=True):
        units[sample, 0, row : row + block[0], column : column + block[1]] = 0.0
    units *= units.size / max(float(units.sum()), 1.0)
    return x * mask.to(x.dtype)


class _Plan(NamedTuple):
    """How to drop: the clamped block, the seed rate, and the path for few seeds."""

    block: tuple[int, int]
    rate: float
    quick: Callable[[Tensor, tuple[int, int], float], Tensor] | None


def _plan(
    drop_prob: float,
    size: tuple[int, int],
    block_size: int,
    gamma: str,
    gamma_scale: float,
    couple_channels: bool,
) -> _Plan:
    block_size = check_integer("block_size", block_size)
    _check_gamma(gamma, gamma_scale)
    drop_prob = check_drop_prob(drop_prob)
    rate_of = paper_rate if gamma == "paper" else seed_rate
    rate = float(rate_of(drop_prob, size, block_size)) * gamma_scale
    block = clamp_block(block_size, size)
    units, places = math.prod(size), math.prod(_places(size, block))
    quick = None
    if couple_channels and rate * places <= MAX_LOOPED:
        quick = drop_shared_blocks
    elif not couple_channels and rate * places * math.prod(block) <= MAX_WRITES * units:
        quick = drop_sparse_blocks
    return _Plan(block, rate, quick)


# one look-up in the place of a dozen small checks, which together cost as much as a small mask
_known_plan = lru_cache(maxsize=1024)(_plan)


def _rate_in_graph(
    drop_prob: float | Tensor,
    size: tuple[int, int],
    block_size: int,
    gamma: str,
    gamma_scale: float,
    device: torch.device,
) -> float | Tensor:
    """The seed rate as a 0-d tensor, so that ``torch.compile`` does not specialise on it."""
    _check_gamma(gamma, gamma_scale)
    if not isinstance(drop_prob, Tensor):
        drop_prob = torch.full((), check_drop_prob(drop_prob), device=device, dtype=torch.float32)
    rate_of = paper_rate if gamma == "paper" else seed_rate_tensor
    return rate_of(drop_prob, size, block_size) * gamma_scale


def _places(size: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the seed positions: where the whole block fits in the map."""
    return size[0] - block[0] + 1, size[1] - block[1] + 1


def _check_gamma(gamma: str, gamma_scale: float) -> None:
    check_choice("gamma", gamma, ("exact", "paper"))
    check_fraction("gamma_scale", gamma_scale, "(0, 1]")


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
        self.block_size = check_integer("block_size", block_size)
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
