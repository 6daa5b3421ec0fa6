"""Cluster tendency: the Hopkins statistic and Spatial Hopkins, its version for images.

Equation numbers are those of DropCluster (arXiv:2002.02997). Both statistics are invariant to
the scale of the data; both are about 0.5 without structure and near 1 with it.
"""

import torch
from torch import Tensor

_NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


@torch.no_grad()
def spatial_hopkins(
    A: Tensor, n_points: int = 64, generator: torch.Generator | None = None
) -> Tensor:
    """Spatial Hopkins statistic of each channel, Eqs. (3)-(5), averaged over the batch.

    For m random pixels that are not on the edge, w_i is the mean distance between the pixel and
    its 8 neighbours, z_i the mean distance between another random pixel, anywhere in the image,
    and the same 8 neighbours: S = sum z / (sum z + sum w). It is taken per image and channel.
    Where both sums are 0, as in a constant image, S is defined as 0.

    Every image of every channel has its own random points. Points shared over the batch would
    repeat the same sampling error in each image instead of averaging it out, and points shared
    over the channels would move all channels of a layer together.

    Args:
        A: (B, C, H, W) with H, W >= 3, any floating dtype; computed in float32 or better.
        n_points: m, points per image, drawn with replacement. The sampling error of the mean over
            the batch shrinks with the root of B * n_points. The paper wants m far below the number
            of pixels; the default of 64 is not on a map of 8x8 or less, where points repeat, which
            costs precision and does not shift the mean.
        generator: Source of the points; the default generator of A's device if None.

    Returns:
        (C,) float32 (float64 for float64 activations) in [0, 1]; NaN where a channel has NaN.

    Raises:
        ValueError: If A is not (B, C, H, W), the batch is empty, the maps are smaller than 3x3,
            or n_points is less than 1.
    """
    shape = tuple(A.shape)
    if len(shape) != 4 or shape[0] == 0:
        raise ValueError(f"A must be (B, C, H, W) with at least one sample; got {shape}")
    height, width = shape[2:]
    if height < 3 or width < 3:
        raise ValueError(f"maps must be at least 3x3; got {height}x{width}")
    _check_points(n_points)
    points = (*shape[:2], n_points)
    y = _random_integers(1, height - 1, points, A, generator)
    x = _random_integers(1, width - 1, points, A, generator)
    other = _random_integers(0, height * width, points, A, generator)
    center = y * width + x
    offsets = torch.tensor([dy * width + dx for dy, dx in _NEIGHBOURS], device=A.device)
    images = A.flatten(2)
    neighbours = images.gather(2, (center[..., None] + offsets).flatten(2))
    neighbours = neighbours.to(torch.promote_types(A.dtype, torch.float32)).view(*points, 8)
    w = (neighbours - images.gather(2, center)[..., None]).abs().mean(-1).sum(-1)
    z = (neighbours - images.gather(2, other)[..., None]).abs().mean(-1).sum(-1)
    return _share(z, w).mean(0)


@torch.no_grad()
def hopkins(
    X: Tensor, n_points: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Hopkins statistic of a set of points, Eq. (2).

    u_i is the distance from a point drawn uniformly between the smallest and the largest value
    of each feature to the nearest of the n points; w_i is the distance from one of the n points,
    drawn without replacement, to the nearest of the others: H = sum u / (sum u + sum w), defined
    as 0 where both sums are 0.

    Args:
        X: (..., n, d) with n >= 2: leading dimensions are independent sets. Any floating dtype;
            computed in float32 or better.
        n_points: m in [1, n]; a tenth of n, rounded up, if None.
        generator: Source of the points; the default generator of X's device if None.

    Returns:
        (...) float32 (float64 for float64 data) in [0, 1].

    Raises:
        ValueError: If X has fewer than two dimensions or points, or n_points is out of range.
    """
    if X.dim() < 2 or X.shape[-2] < 2:
        raise ValueError(f"X must be (..., n, d) with n >= 2 points; got {tuple(X.shape)}")
    n = X.shape[-2]
    n_points = -(-n // 10) if n_points is None else n_points
    _check_points(n_points, n)
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    low, high = X.amin(-2, keepdim=True), X.amax(-2, keepdim=True)
    uniform = _random((*X.shape[:-2], n_points, X.shape[-1]), X, generator)
    artificial = low + (high - low) * uniform
    chosen = _random(X.shape[:-1], X, generator).argsort(-1)[..., :n_points, None]
    actual = X.gather(-2, chosen.expand(*chosen.shape[:-1], X.shape[-1]))
    u = _distances(artificial, X).amin(-1)
    w = _distances(actual, X).scatter_(-1, chosen, torch.inf).amin(-1)
    return _share(u.sum(-1), w.sum(-1))


def _check_points(n_points: int, largest: int | None = None) -> None:
    if largest is None and n_points < 1:
        raise ValueError(f"n_points must be at least 1; got {n_points}")
    if largest is not None and not 1 <= n_points <= largest:
        raise ValueError(f"n_points must be in [1, n = {largest}]; got {n_points}")


def _random_integers(
    low: int, high: int, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Uniform int64 in [low, high), drawn on the generator's device and moved to that of like."""
    device = like.device if generator is None else generator.device
    drawn = torch.randint(low, high, shape, generator=generator, device=device)
    return drawn.to(like.device)


def _random(
    shape: tuple[int, ...] | torch.Size, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Uniform in [0, 1) with the dtype of like, drawn on the generator's device."""
    device = like.device if generator is None else generator.device
    drawn = torch.rand(shape, generator=generator, device=device, dtype=like.dtype)
    return drawn.to(like.device)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (..., m, n), by differences: products would lose small distances."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _share(part: Tensor, rest: Tensor) -> Tensor:
    """part / (part + rest), 0 where both are 0."""
    total = part + rest
    return torch.where(total == 0, 0.0, part / torch.where(total == 0, 1.0, total))
