"""Dropping few blocks on a CPU: work for the seeds drawn, not for every position of every map.

The dense way draws a number per position and grows a mask by comparing. Here only the gaps between
seeds are drawn and only the blocks are written. Most maps have no block or one, so the masks of a
layer are few distinct ones; a list of those and the number of each map's mask take the place of a
mask as large as the activations, and wait for the backward pass in its stead.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["draw_seeds", "drop_sparse_blocks", "may_look_at_data"]


class Seeds(NamedTuple):
    """Seeds drawn: the map of each, sorted, and its place among the map's seed positions."""

    maps: Tensor
    places: Tensor


class MapMasks(NamedTuple):
    """The distinct masks (K, 1, H, W), the number of each map's mask, and how many units drop."""

    masks: Tensor
    numbers: Tensor
    dropped: int


def may_look_at_data(x: Tensor) -> bool:
    """Whether the work done may depend on what was drawn: eagerly, on a CPU, on real data.

    Args:
        x: activations of any shape.
    """
    known = type(x) in (Tensor, torch.nn.Parameter)  # e.g. fake tensors have no data to look at
    return known and x.device.type == "cpu" and not torch.compiler.is_compiling()


def drop_sparse_blocks(x: Tensor, block: tuple[int, int], rate: float) -> Tensor:
    """DropBlock of a CPU tensor, one mask per sample and channel, seeds where a block fits.

    Args:
        x: activations (B, C, H, W).
        block: (rows, columns) of the blocks, at most (H, W).
        rate: the seed rate, in [0, 1].

    Returns:
        ``x * M * count(M) / count_ones(M)``, M zero in the blocks.
    """
    batch, channels, height, width = x.shape
    size = (height, width)
    seeds = draw_map_seeds(batch * channels, size, block, rate)
    found = distinct_masks(seeds, batch * channels, size, block, x.dtype)
    scale = x.numel() / max(x.numel() - found.dropped, 1)
    if x.is_contiguous():
        return _MultiplyMaps.apply(x, found.masks.mul_(scale), found.numbers)
    return _ZeroBlocks.apply(x, seeds.maps, seeds.places, block, scale)


def draw_seeds(n_positions: int, rate: float, chunk: int | None = None) -> Tensor:
    """The positions drawn by ``n_positions`` independent Bernoulli(rate) trials.

    The gaps between them are geometric, so only as many numbers are drawn as there are seeds.

    Args:
        n_positions: number of trials.
        rate: probability of each, in [0, 1].
        chunk: how many gaps to draw at once; the default nearly always covers all positions.

    Returns:
        Sorted int64 positions in [0, n_positions), on the CPU.
    """
    if rate <= 0.0 or n_positions == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    if rate >= 1.0:
        return torch.arange(n_positions, device="cpu")
    if chunk is None:
        expected = n_positions * rate
        chunk = int(expected + 6 * math.sqrt(expected)) + 16
    found = []
    reached = 0.0  # counted from 1 while drawing
    while reached <= n_positions:
        gaps = torch.rand(chunk, dtype=torch.float64, device="cpu").neg_().log1p_()
        gaps.div_(math.log1p(-rate)).floor_().add_(1.0)
        found.append(gaps.cumsum_(0).add_(reached))
        reached = float(found[-1][-1])
    positions = found[0] if len(found) == 1 else torch.cat(found)
    inside = int(torch.searchsorted(positions, n_positions, right=True))
    return positions[:inside].sub_(1.0).long()


def draw_map_seeds(
    n_maps: int, size: tuple[int, int], block: tuple[int, int], rate: float
) -> Seeds:
    """:func:`draw_seeds` on all positions of ``n_maps`` H x W maps where a block fits."""
    per_map = (size[0] - block[0] + 1) * (size[1] - block[1] + 1)
    places = draw_seeds(n_maps * per_map, rate)
    maps = places // per_map
    return Seeds(maps, places.sub_(maps * per_map))


def distinct_masks(
    seeds: Seeds, n_maps: int, size: tuple[int, int], block: tuple[int, int], dtype: torch.dtype
) -> MapMasks:
    """The masks of ``n_maps`` maps as a list without repetitions, as far as that is cheap to tell.

    Mask 0 has no block. Where more maps have a single block than a block has places, the masks
    1 ... places have one block each and the maps with several blocks, which may overlap, follow;
    otherwise every map with a block has a mask of its own.
    """
    maps, places = seeds
    starts = torch.ones(len(maps) + 1, dtype=torch.bool, device="cpu")
    torch.ne(maps[1:], maps[:-1], out=starts[1:-1])
    first, last = starts[:-1], starts[1:]
    per_map = (size[0] - block[0] + 1) * (size[1] - block[1] + 1)
    own = (first & last).logical_not_().nonzero().squeeze(1)
    n_single = len(maps) - len(own)
    if n_single <= per_map:
        own, n_single, per_map = torch.arange(len(maps), device="cpu"), 0, 0
    own_numbers = first.index_select(0, own).cumsum(0).add_(per_map)
    n_own = int(own_numbers[-1]) - per_map if len(own) else 0

    masks = torch.ones(1 + per_map + n_own, 1, *size, dtype=dtype, device="cpu")
    every = torch.arange(per_map, device="cpu")
    _zero_blocks(masks, every + 1, every, block)
    _zero_blocks(masks, own_numbers, places.index_select(0, own), block)
    own_masks = masks[1 + per_map :]
    # float32 counts one map exactly, float64 all of them
    kept = own_masks.flatten(1).sum(1, dtype=torch.float32).sum(dtype=torch.float64)
    dropped = n_single * block[0] * block[1] + own_masks.numel() - int(kept)

    of_seed = (places + 1).scatter_(0, own, own_numbers)
    numbers = torch.zeros(n_maps, dtype=torch.int64, device="cpu").scatter_(0, maps, of_seed)
    return MapMasks(masks, numbers, dropped)


def _zero_blocks(x: Tensor, maps: Tensor, places: Tensor, block: tuple[int, int]) -> Tensor:
    """Zero the blocks of x (B, C, H, W), which has no gaps in its memory, in place.

    Every block is a window of one overlapping strided view, whose first dimension is the window's
    offset in memory.
    """
    if len(maps) == 0:
        return x
    rows, cols = block
    channels, height, width = x.shape[1:]
    batch_step, channel_step, row_step, col_step = x.stride()
    starts = maps * channel_step
    if batch_step != channels * channel_step:
        starts += maps // channels * (batch_step - channels * channel_step)
    place_rows = torch.arange(height - rows + 1, device="cpu") * row_step
    place_cols = torch.arange(width - cols + 1, device="cpu") * col_step
    starts += (place_rows[:, None] + place_cols).flatten().index_select(0, places)
    windows = x.numel() - (rows - 1) * row_step - (cols - 1) * col_step
    view = x.as_strided((windows, rows, cols), (1, row_step, col_step))
    view.index_fill_(0, starts, 0)
    return x


class _MultiplyMaps(torch.autograd.Function):
    """Each map of x (B, C, H, W) times one of the masks (K, 1, H, W): linear, its own adjoint."""

    @staticmethod
    def forward(x: Tensor, masks: Tensor, numbers: Tensor) -> Tensor:
        # a view as the output would forbid the in-place additions and activations of networks
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.index_select(masks, 0, numbers, out=out.view(len(numbers), 1, *x.shape[2:]))
        return out.mul_(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _MultiplyMaps.apply(grad, *ctx.saved_tensors), None, None


class _ZeroBlocks(torch.autograd.Function):
    """``x * scale`` with zeros in blocks, in the memory format of x: linear, its own adjoint."""

    @staticmethod
    def forward(
        x: Tensor, maps: Tensor, places: Tensor, block: tuple[int, int], scale: float
    ) -> Tensor:
        return _zero_blocks(x * scale, maps, places, block)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, maps, places, ctx.block, ctx.scale = inputs
        ctx.save_for_backward(maps, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out = _ZeroBlocks.apply(grad, *ctx.saved_tensors, ctx.block, ctx.scale)
        return out, None, None, None, None
