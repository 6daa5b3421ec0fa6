"""DropBlock (Ghiasi, Lin & Le, 2018, arXiv:1810.12890): drop square blocks of the maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_structdrop.layers.base import (
    Paper,
    Placement,
    StructDropLayer,
    check_choice,
    check_drop_prob,
    check_fraction,
    check_integer,
    check_maps,
    register,
)
from timm_structdrop.layers.blocks import (
    apply_mask,
    clamp_block,
    grow_blocks,
    may_look_at_data,
    paper_rate,
    seed_places,
    seed_rate,
    seed_rate_tensor,
    uniform,
)

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
    shape = (batch, 1 if couple_channels else channels, *seed_places((height, width), block))
    drawn = uniform(shape, x.device) < rate
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
    drawn = uniform((batch, *seed_places((height, width), block)), x.device).numpy() < rate
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
    units, places = math.prod(size), math.prod(seed_places(size, block))
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


def _check_gamma(gamma: str, gamma_scale: float) -> None:
    check_choice("gamma", gamma, ("exact", "paper"))
    check_fraction("gamma_scale", gamma_scale, "(0, 1]")


class Seeds(NamedTuple):
    """Seeds drawn: the map of each, sorted, and its place among the map's seed positions."""

    maps: Tensor
    places: Tensor


class MapMasks(NamedTuple):
    """The distinct masks (K, 1, H, W), the number of each map's mask, and how many units drop."""

    masks: Tensor
    numbers: Tensor
    dropped: int


def drop_sparse_blocks(x: Tensor, block: tuple[int, int], rate: float) -> Tensor:
    """DropBlock of a CPU tensor, one mask per sample and channel: work for the seeds drawn, not for
    every position of every map.

    The dense way draws a number per position and grows a mask by comparing. Here only the gaps
    between seeds are drawn and only the blocks are written. Most maps have no block or one, so the
    masks of a layer are few distinct ones; a list of those and the number of each map's mask take
    the place of a mask as large as the activations, and wait for the backward pass in its stead.

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
    per_map = math.prod(seed_places(size, block))
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
    per_map = math.prod(seed_places(size, block))
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
    channels = x.shape[1]
    n_rows, n_cols = seed_places((x.shape[2], x.shape[3]), block)
    batch_step, channel_step, row_step, col_step = x.stride()
    starts = maps * channel_step
    if batch_step != channels * channel_step:
        starts += maps // channels * (batch_step - channels * channel_step)
    place_rows = torch.arange(n_rows, device="cpu") * row_step
    place_cols = torch.arange(n_cols, device="cpu") * col_step
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


@register(
    "dropblock",
    summary="drops square blocks at seeds drawn independently per sample and channel",
    paper=Paper.with_bibtex(
        "Ghiasi et al. 2018, arXiv:1810.12890",
        "DropBlock",
        "DropBlock: A regularization method for convolutional networks",
        "https://arxiv.org/abs/1810.12890",
        "inproceedings",
        "ghiasi2018dropblock",
        author="Ghiasi, Golnaz and Lin, Tsung-Yi and Le, Quoc V.",
        booktitle="Advances in Neural Information Processing Systems",
        volume="31",
        year="2018",
    ),
    placement=Placement(
        where=("conv", "last_conv", "skip"),
        last_stages=2,
        early={"gamma_scale": 0.25},
        early_words="gamma / 4",
        schedule="linear",
    ),
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
