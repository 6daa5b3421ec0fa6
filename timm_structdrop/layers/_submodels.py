"""Which units the two sub models of R-Block drop, as products of channels and positions.

Both of the paper's algorithms drop one spatial mask of a sample in some of its channels, so their
masks are kept as factors: for the 2B rows of a forked batch, sub model 1's B samples first,

    unit (c, i, j) of row b is dropped  <=>  channels[b, c] and space[b, i, j].

That takes B * (C + H * W) random numbers instead of B * C * H * W.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from timm_structdrop.layers._blocks import clamp_block, grow_blocks
from timm_structdrop.layers._rate import paper_rate, seed_rate, seed_rate_tensor

__all__ = ["Dropped", "b_drop_dml", "drop", "one_of_both", "s_drop_dml"]


class Dropped(NamedTuple):
    """The dropped units: ``channels`` (N, C) and ``space`` (N, H, W), bool."""

    channels: Tensor
    space: Tensor


def b_drop_dml(
    shape: tuple[int, int, int, int],
    drop_prob: float | Tensor,
    block_size: int = 3,
    gamma: str = "paper",
    device: torch.device | None = None,
    seeds: str = "valid",
) -> Dropped:
    """Algorithm 1, BDropDML: the same blocks, in complementary channels.

    Each sample has one mask of blocks, and each of its channels belongs to sub model 1 or 2 by a
    fair coin; a sub model drops the blocks in its own channels.

    Args:
        shape: (B, C, H, W) of the activations before the fork.
        drop_prob: p in [0, 1), a float or a 0-d tensor; the expected fraction of a map in blocks.
        block_size: side of the blocks; clamped to H and to W.
        gamma: the seed rate. ``"paper"``: Eq. (7), p H W / (b^2 (H - b + 1) (W - b + 1)) for blocks
            of side b; ``"eq6"``: Eq. (6), p / b^2; both are for blocks that do not overlap, and
            they do. ``"exact"``: the rate at which blocks cover p.
        device: where to draw.
        seeds: ``"valid"``: wherever a whole block fits; ``"all"``: everywhere, as the algorithm is
            written, blocks are cut at the border. Eq. (7) is of the first, Eq. (6) of the second.

    Returns:
        The dropped units of the 2B rows.
    """
    batch, channels, height, width = shape
    size = (height, width)
    block = clamp_block(block_size, size)
    rate: float | Tensor
    if gamma == "paper":
        rate = paper_rate(drop_prob, size, block_size)
    elif gamma == "eq6":
        rate = drop_prob / (block[0] * block[1])
    elif isinstance(drop_prob, Tensor):
        rate = seed_rate_tensor(drop_prob, size, block_size, seeds)
    else:
        rate = seed_rate(drop_prob, size, block_size, seeds)
    places = size if seeds == "all" else (height - block[0] + 1, width - block[1] + 1)
    drawn = _uniform((batch, 1, *places), device) < rate
    blocks = grow_blocks(drawn, block, seeds).squeeze(1)
    first = _uniform((batch, channels), device) < 0.5
    return Dropped(torch.cat((first, ~first)), torch.cat((blocks, blocks)))


def s_drop_dml(
    shape: tuple[int, int, int, int],
    drop_prob: float | Tensor,
    block_size: int = 3,
    device: torch.device | None = None,
) -> Dropped:
    """Algorithm 2, SDropDML: the same channels, complementary regions.

    Each channel of a sample is selected with probability p. Each sample has one mask of blocks,
    from seeds everywhere at the rate at which they cover half of the map in expectation, the root
    of Eq. (8) for 0.5. On the selected channels sub model 1 drops the blocks and sub model 2
    everything else.

    Args:
        shape: (B, C, H, W) of the activations before the fork.
        drop_prob: p in [0, 1), a float or a 0-d tensor.
        block_size: side of the blocks; clamped to H and to W.
        device: where to draw.

    Returns:
        The dropped units of the 2B rows.
    """
    batch, channels, height, width = shape
    selected = _uniform((batch, channels), device) < drop_prob
    block = clamp_block(block_size, (height, width))
    rate = half_rate((height, width), block_size, device)
    drawn = _uniform((batch, 1, height, width), device) < rate
    blocks = grow_blocks(drawn, block, seeds="all").squeeze(1)
    return Dropped(torch.cat((selected, selected)), torch.cat((blocks, ~blocks)))


def one_of_both(dropped: Dropped) -> Dropped:
    """For each sample the units of one sub model, by a fair coin.

    Args:
        dropped: of 2B rows, sub model 1's B first.

    Returns:
        The dropped units of B rows, ``channels`` (B, C) and ``space`` (B, H, W).
    """
    first_channels, second_channels = dropped.channels.chunk(2)
    first_space, second_space = dropped.space.chunk(2)
    coin = _uniform((len(first_channels), 1), dropped.channels.device) < 0.5
    return Dropped(
        torch.where(coin, first_channels, second_channels),
        torch.where(coin[:, :, None], first_space, second_space),
    )


def drop(x: Tensor, dropped: Dropped) -> Tensor:
    """``x * M / s``: M zero in the dropped units, s the proportion of ones in M, row by row.

    The proportion is each sample's own, as the algorithms are written for one input. A row without
    ones is zero.

    Args:
        x: activations (N, C, H, W).
        dropped: the dropped units of N rows.

    Returns:
        (N, C, H, W) in the dtype and memory format of ``x``.
    """
    per_map = dropped.space.shape[1:].numel()
    channels, space = dropped.channels.float(), dropped.space.float()
    count = channels.shape[1] * per_map
    kept = count - channels.sum(1) * space.sum((1, 2))
    scale = count / kept.clamp(min=1.0)
    channels = channels * -scale[:, None]
    # the factors as they lie in memory: a product of two layouts is several times slower
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        factors = channels[:, :, None, None] * space[:, None] + scale[:, None, None, None]
    else:
        factors = channels[:, None, None] * space[..., None] + scale[:, None, None, None]
        factors = factors.permute(0, 3, 1, 2)
    return x * factors.to(x.dtype)


def half_rate(
    size: tuple[int, int], block_size: int, device: torch.device | None
) -> float | Tensor:
    """The seed rate whose blocks cover half of an H x W map."""
    if torch.compiler.is_compiling():
        # the solver of floats is a loop over dicts and caches that no graph holds
        half = torch.full((), 0.5, device=device)
        return seed_rate_tensor(half, size, block_size, seeds="all")
    return seed_rate(0.5, size, block_size, seeds="all")


def _uniform(shape: tuple[int, ...], device: torch.device | None) -> Tensor:
    # float32 whatever the activations: float16 uniforms would round the rates
    return torch.rand(shape, device=device, dtype=torch.float32)
