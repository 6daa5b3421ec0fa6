"""Where CamDrop may drop: class activation maps, and the pixels and channels highest in them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "candidate_pixels",
    "check_alpha",
    "compress",
    "dominant_channels",
    "guidance",
    "highest",
    "how_many_pixels",
    "inner_seeds",
]


def compress(alpha: Tensor, channels: int) -> Tensor:
    """Eq. (7): as many weights as a layer has channels, from those of the classifier.

    With g = floor(C' / C), weight c is the sum of alpha[c g], ..., alpha[c g + g - 1]; the last
    C' - C g are not used. The paper has no case of C > C'; then weight c is alpha[floor(c C' / C)].

    Args:
        alpha: (B, C').
        channels: C.

    Returns:
        (B, C) float32.
    """
    alpha = alpha.float()
    features = alpha.shape[1]
    if channels > features:
        index = torch.arange(channels, device=alpha.device) * features // channels
        return alpha.index_select(1, index)
    group = features // channels
    return alpha[:, : group * channels].unflatten(1, (channels, group)).sum(2)


def guidance(x: Tensor, alpha: Tensor | None, guide: str) -> tuple[Tensor, Tensor]:
    """The weights of the channels (B, C) and the map J (B, H, W), both float32.

    Args:
        x: activations (B, C, H, W).
        alpha: the classifier's weights (B, C'), for ``"cam"``.
        guide: ``"cam"``: J = sum_c alpha_c x_c, Eqs. (5) and (7); ``"avg"``: J is the mean of the
            channels, and a channel's weight its mean over the map.
    """
    if guide == "avg" or alpha is None:
        return x.mean((2, 3), dtype=torch.float32), x.mean(1, dtype=torch.float32)
    weights = compress(alpha, x.shape[1])
    if torch.compiler.is_compiling():  # fuses what would be a float32 copy of x
        return weights, (x.float() * weights[:, :, None, None]).sum(1)
    with torch.autocast(x.device.type, enabled=False):  # it would round J to half precision
        cam = torch.bmm(weights[:, None], x.float().flatten(2))
    return weights, cam.view(x.shape[0], x.shape[2], x.shape[3])


def check_alpha(x: Tensor, alpha: Tensor | None, guide: str) -> None:
    """That the weights are there where they are needed.

    Args:
        x: activations (B, C, H, W).
        alpha: the classifier's weights (B, C').
        guide: ``"cam"`` needs them.

    Raises:
        ValueError: ``alpha`` is needed and is not (B, C').
    """
    if guide == "cam" and (alpha is None or alpha.ndim != 2 or alpha.shape[0] != x.shape[0]):
        received = None if alpha is None else tuple(alpha.shape)
        raise ValueError(
            f"alpha must be (B, features) with B = {x.shape[0]} where guide is 'cam'; "
            f"got {received}"
        )


def how_many_pixels(
    size: tuple[int, int], block: tuple[int, int], n_pixels: int | None = None, rank: str = "all"
) -> int:
    """n of Eq. (6): how many positions of the seed grid are candidates.

    Args:
        size: (H, W) of the map.
        block: (rows, columns) of the blocks, at most (H, W).
        n_pixels: n, all of the grid if that is more; None for floor(H W / (rows columns)).
        rank: ``"all"``: the seed grid is the map; ``"valid"``: it is that of :func:`inner_seeds`.
    """
    height, width = size
    n = height * width // (block[0] * block[1]) if n_pixels is None else n_pixels
    if rank == "valid":
        height, width = height - block[0] + 1, width - block[1] + 1
    return min(n, height * width)


def candidate_pixels(
    intensity: Tensor, block: tuple[int, int], n: int, rank: str = "all"
) -> Tensor | None:
    """Eq. (6): the n positions of the seed grid where J is highest.

    Args:
        intensity: J (B, H, W).
        block: (rows, columns) of the blocks, at most (H, W).
        n: of :func:`how_many_pixels`.
        rank: as there.

    Returns:
        Places (B, n) int64 of the flattened grid, in no order; None for all of the grid.
    """
    if rank == "valid":
        intensity = inner_seeds(intensity, block)
    intensity = intensity.flatten(1)
    return None if n == intensity.shape[1] else highest(intensity, n)


def dominant_channels(channels: int, n_channels: int | float | None = None) -> int:
    """n' of Eq. (8): how many of C channels are candidates.

    Args:
        channels: C.
        n_channels: a number, C if that is less; a float, a fraction of C, rounded down; None, C / 8
            rounded down. At least 1.
    """
    if n_channels is None:
        return max(1, channels // 8)
    if isinstance(n_channels, float):
        return max(1, int(n_channels * channels))
    return min(n_channels, channels)


def highest(values: Tensor, k: int) -> Tensor:
    """Indices of the highest values in each row; all of them are in order, fewer in no order.

    Args:
        values: (B, N).
        k: how many, in [1, N].

    Returns:
        (B, k) int64.
    """
    if k == values.shape[1]:
        return torch.arange(k, device=values.device).expand(len(values), k)
    return values.topk(k, dim=1, sorted=False).indices


def inner_seeds(maps: Tensor, block: tuple[int, int]) -> Tensor:
    """The part of maps where a block fits around a seed.

    A block reaches (rows - 1) // 2 above its seed and rows // 2 below: the seed is the block's
    middle, the first of two if it is even.

    Args:
        maps: (..., H, W).
        block: (rows, columns) of the blocks, at most (H, W).

    Returns:
        (..., H - rows + 1, W - columns + 1), a view.
    """
    height, width = maps.shape[-2:]
    top, left = (block[0] - 1) // 2, (block[1] - 1) // 2
    return maps[..., top : height - block[0] // 2, left : width - block[1] // 2]
