"""From seeds to blocks, for the layers that drop squares."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["clamp_block", "grow_blocks"]


def clamp_block(block_size: int, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the blocks on a map: a block is never larger than the map.

    Args:
        block_size: side of the blocks, at least 1.
        size: (H, W) of the map.
    """
    return min(block_size, size[0]), min(block_size, size[1])


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
