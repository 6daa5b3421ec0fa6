"""What regularizers share on tensors: seed rates, blocks, and "rescale what is kept".

How often to draw a block's seed so that the expected fraction of dropped units is exactly p.

A unit (i, j) is dropped if one of the n(i, j) seed positions whose block covers it is drawn, so
with seeds drawn independently at rate gamma the expected fraction dropped is

    p = mean over the map of 1 - (1 - gamma)^n(i, j).

With t = -log(1 - gamma) and q(t) = mean of exp(-n t), the kept fraction, this is
log q(t) = log(1 - p). The left side is minus a cumulant generating function: its slope is minus the
mean mu of n weighted by exp(-n t), and its curvature the variance v. With h = log q(t) - log(1 - p)
the step a (1 + a v / (2 mu)), a = h / mu, is Chebyshev's, of third order: from t = 0 it reaches
float64 in so few steps that a fixed number of them serves where control flow may not depend on
data.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache

import torch
from torch import Tensor

from timm_structdrop.layers.base import check_choice, check_drop_prob, check_integer

__all__ = [
    "apply_mask",
    "bernoulli_scale",
    "clamp_block",
    "drop_alike",
    "grow_blocks",
    "kept_scale",
    "may_look_at_data",
    "paper_rate",
    "seed_places",
    "seed_rate",
    "seed_rate_tensor",
    "uniform",
]

# 4 steps were seen to reach 2e-11 over maps up to 224 x 224, blocks up to 150 and p up to 1 - 1e-6
STEPS = 4
MAX_STEPS = 30


def seed_rate(p: float, size: tuple[int, int], block_size: int = 7, seeds: str = "valid") -> float:
    """The seed rate gamma at which blocks drop a fraction ``p`` of the units, in expectation.

    Exact to float64, and cached. With ``seeds="valid"`` this is what Eq. (1) of DropBlock
    approximates, with ``seeds="all"`` the root of Eq. (8) of R-Block, for any map and block instead
    of odd blocks smaller than half of the map.

    Args:
        p: expected fraction of dropped units, in [0, 1).
        size: (H, W) of the map.
        block_size: side of the blocks; clamped to H and to W.
        seeds: ``"valid"``: seeds only where the whole block fits in the map; ``"all"``: seeds
            everywhere, blocks are cut at the border.

    Returns:
        gamma in [0, 1).

    Raises:
        ValueError: ``p`` is outside [0, 1), ``size`` or ``block_size`` is below 1, or ``seeds`` is
            unknown.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size must be (H, W) of at least 1; got {tuple(size)}")
    block_size = check_integer("block_size", block_size)
    check_choice("seeds", seeds, ("valid", "all"))
    return _solve(check_drop_prob(p), height, width, block_size, seeds)


def paper_rate(p: float | Tensor, size: tuple[int, int], block_size: int = 7) -> float | Tensor:
    """Eq. (1) of DropBlock: the seed rate of blocks that do not overlap.

    They do overlap, so that fewer than ``p`` of the units are dropped.

    Args:
        p: fraction of units to drop, in [0, 1), a float or a 0-d tensor; not checked.
        size: (H, W) of the map.
        block_size: side of the blocks; clamped to H and to W.

    Returns:
        gamma, at most ``p``, of the type of ``p``.
    """
    block = clamp_block(block_size, size)
    rows, columns = seed_places(size, block)
    return p * (size[0] * size[1] / (block[0] * block[1] * rows * columns))


def seed_rate_tensor(
    p: Tensor, size: tuple[int, int], block_size: int = 7, seeds: str = "valid"
) -> Tensor:
    """:func:`seed_rate` on the device of ``p``, without a synchronisation or data-dependent shapes.

    Args:
        p: 0-d tensor in [0, 1); values are not checked.
        size: (H, W) of the map.
        block_size: side of the blocks; clamped to H and to W.
        seeds: ``"valid"`` or ``"all"``.

    Returns:
        gamma as a 0-d float64 tensor (float32 on MPS, which has no float64).
    """
    dtype = torch.float32 if p.device.type == "mps" else torch.float64
    rows, row_weights = _axis_tensors(size[0], block_size, seeds, p.device, dtype)
    cols, col_weights = rows, row_weights
    if size[1] != size[0]:
        cols, col_weights = _axis_tensors(size[1], block_size, seeds, p.device, dtype)
    minus_n = torch.outer(-rows, cols).flatten()
    weights = torch.outer(row_weights, col_weights).flatten()
    slopes = weights * minus_n
    moments = torch.stack([weights, slopes, slopes * minus_n])
    at_zero = moments.sum(1)
    target = torch.log1p(-p.to(dtype))
    t = _chebyshev_step(-target, *at_zero.unbind())
    for _ in range(STEPS):
        change = (moments * torch.expm1(minus_n * t)).sum(1)
        t = t + _chebyshev_step(torch.log1p(change[0]) - target, *(at_zero + change).unbind())
    return -torch.expm1(-t)


def _chebyshev_step(h: Tensor, kept: Tensor, slope: Tensor, square: Tensor) -> Tensor:
    """The step at h, from the sums of w, -n w and n^2 w with w = exp(-n t)."""
    newton = -h * kept / slope
    return newton * (1.0 + newton * 0.5 * (slope / kept - square / slope))


@lru_cache(maxsize=4096)
def _solve(p: float, height: int, width: int, block_size: int, seeds: str) -> float:
    histogram = _histogram(height, width, block_size, seeds)
    target = math.log1p(-p)
    t = 0.0
    for _ in range(MAX_STEPS):
        kept = [(n, weight * math.exp(-n * t)) for n, weight in histogram]
        total = math.fsum(k for _, k in kept)
        mean = math.fsum(n * k for n, k in kept) / total
        variance = math.fsum((n - mean) ** 2 * k for n, k in kept) / total
        if p < 0.5:
            log_kept = math.log1p(math.fsum(w * math.expm1(-n * t) for n, w in histogram))
        else:
            log_kept = math.log(total)
        newton = (log_kept - target) / mean
        t += newton * (1.0 + newton * variance / (2.0 * mean))
        if abs(newton) <= 1e-15 * t:
            break
    return -math.expm1(-t)


@lru_cache(maxsize=1024)
def _histogram(height: int, width: int, block_size: int, seeds: str) -> list[tuple[int, float]]:
    """The values n(i, j) takes on the map, each with the fraction of the pixels that have it."""
    counts: Counter[int] = Counter()
    for n_row, rows in _axis(height, block_size, seeds).items():
        for n_col, cols in _axis(width, block_size, seeds).items():
            counts[n_row * n_col] += rows * cols
    return [(n, count / (height * width)) for n, count in sorted(counts.items())]


def _axis(length: int, block_size: int, seeds: str) -> Counter[int]:
    """How many positions of an axis are covered by 1, 2, ... of its seeds."""
    block = min(block_size, length)
    before, after, last = _reach(length, block, seeds)
    return Counter(min(i + before, last) - max(i - after, 0) + 1 for i in range(length))


def _axis_tensors(
    length: int, block_size: int, seeds: str, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """:func:`_axis` built on the device: covering seeds per position, and the positions' weights.

    An axis longer than two blocks only repeats the count in its middle, so at most
    ``2 * block_size + 1`` positions are listed and the middle one stands for the rest.
    """
    block = min(block_size, length)
    listed = min(length, 2 * block + 1)
    before, after, last = _reach(listed, block, seeds)
    i = torch.arange(listed, device=device, dtype=dtype)
    n = (i + before).clamp(max=last) - (i - after).clamp(min=0) + 1
    weights = torch.where(i == min(block, listed - 1), length - listed + 1.0, 1.0).to(dtype)
    return n, weights / length


def _reach(length: int, block: int, seeds: str) -> tuple[int, int, int]:
    """(before, after, last): position i is covered by the seeds in [i - after, i + before] that lie
    in [0, last]. A seed of ``"valid"`` is its block's first position, one of ``"all"`` its middle.
    """
    if seeds == "valid":
        return 0, block - 1, length - block
    return (block - 1) // 2, block // 2, length - 1


def clamp_block(block_size: int, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the blocks on a map: a block is never larger than the map.

    Args:
        block_size: side of the blocks, at least 1.
        size: (H, W) of the map.
    """
    return min(block_size, size[0]), min(block_size, size[1])


def seed_places(
    size: tuple[int, int], block: tuple[int, int], seeds: str = "valid"
) -> tuple[int, int]:
    """(rows, columns) of the grid of positions where a seed may be.

    Args:
        size: (H, W) of the map.
        block: (rows, columns) of the blocks, at most (H, W).
        seeds: ``"valid"``: wherever a whole block fits; ``"all"``: everywhere.
    """
    return size if seeds == "all" else (size[0] - block[0] + 1, size[1] - block[1] + 1)


def grow_blocks(drawn: Tensor, block: tuple[int, int], seeds: str = "valid") -> Tensor:
    """The union of the blocks grown from drawn seeds, with no data-dependent shapes.

    The number of seeds whose block covers a unit is a sum over rows and columns, so two products
    with band matrices count them; pooling a 7x7 window is ten times slower on a CPU.

    Args:
        drawn: where a seed was drawn, bool. ``seeds="valid"``: (B, C, H - rows + 1,
            W - columns + 1), a seed is the first unit of its block. ``seeds="all"``: (B, C, H, W),
            a seed is the middle of its block, the first of two middles if the block is even, and
            the block is cut at the border.
        block: (rows, columns) of the blocks, at most (H, W).
        seeds: ``"valid"`` or ``"all"``.

    Returns:
        True in the blocks, (B, C, H, W) bool.
    """
    rows = _covers(drawn.shape[-2], block[0], seeds, drawn.device)
    cols = _covers(drawn.shape[-1], block[1], seeds, drawn.device)
    return rows @ drawn.float() @ cols.T > 0


def _covers(n_seeds: int, block: int, seeds: str, device: torch.device) -> Tensor:
    """1 where the block of a seed covers a position, float32 (positions, seeds)."""
    valid = seeds == "valid"
    n_positions = n_seeds + block - 1 if valid else n_seeds
    before = 0 if valid else (block - 1) // 2
    ones = torch.ones(n_positions, n_seeds, device=device, dtype=torch.float32)
    return ones.tril(before).triu(before + 1 - block)


def uniform(shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Uniform numbers in [0, 1) to compare with a rate.

    In float32 whatever the activations: numbers in float16 would round rates of 1e-3 by 5 %.

    Args:
        shape: any shape.
        device: where to draw.
    """
    return torch.rand(shape, device=device, dtype=torch.float32)


def kept_scale(count: int, kept: Tensor) -> Tensor:
    """count(M) / count_ones(M), what kept units are multiplied by.

    A mask without ones gives ``count``, a finite number, so that the masked activations are zero
    instead of NaN.

    Args:
        count: the units of the mask, count(M).
        kept: how many of them are kept, count_ones(M), of any shape, in float32: in float16 the
            count overflows at 65504 units and the scale becomes 0.

    Returns:
        The shape of ``kept``, float32.
    """
    return count / kept.clamp(min=1.0)


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """``x * M * count(M) / count_ones(M)``.

    Args:
        x: activations of any shape.
        mask: M, zeros and ones of a shape that broadcasts against that of ``x``.

    Returns:
        The shape, dtype and memory format of ``x``.
    """
    scale = kept_scale(mask.numel(), mask.sum(dtype=torch.float32))
    return x * (mask * scale).to(x.dtype)


def bernoulli_scale(shape: tuple[int, ...], drop_prob: float | Tensor, like: Tensor) -> Tensor:
    """Independent factors: 0 with probability p, else 1 / (1 - p), so that their mean is 1.

    Args:
        shape: the shape of the result.
        drop_prob: p in [0, 1), a float or a 0-d tensor; not checked.
        like: the tensor whose device and dtype the factors have.
    """
    kept = uniform(shape, like.device) >= drop_prob
    return (kept / (1.0 - drop_prob)).to(like.dtype)


def drop_alike(
    x: Tensor, n_dims: int, drop_prob: float | Tensor = 0.1, training: bool = True
) -> Tensor:
    """Drop what the first dimensions of ``x`` index, with all of its units: samples, channels.

    Args:
        x: activations of any shape.
        n_dims: how many dimensions have a draw each: 1 drops samples, 2 their channels.
        drop_prob: p in [0, 1). A 0-d tensor is not checked.
        training: if False, ``x`` is returned.

    Returns:
        ``x`` times :func:`bernoulli_scale` of the shape (B, ..., 1, ..., 1).

    Raises:
        ValueError: p is a float outside [0, 1).
    """
    if not isinstance(drop_prob, Tensor):
        drop_prob = check_drop_prob(drop_prob)
    if not training:
        return x
    shape = (*x.shape[:n_dims], *[1] * (x.ndim - n_dims))
    return x * bernoulli_scale(shape, drop_prob, x)


def may_look_at_data(x: Tensor) -> bool:
    """Whether the work done may depend on what was drawn: eagerly, on a CPU, on real data.

    Args:
        x: activations of any shape.
    """
    known = type(x) in (Tensor, torch.nn.Parameter)  # e.g. fake tensors have no data to look at
    return known and x.device.type == "cpu" and not torch.compiler.is_compiling()
