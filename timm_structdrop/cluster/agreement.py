"""How much two partitions of the same pixels agree."""

import torch
from torch import Tensor


def adjusted_rand_index(labels_a: Tensor, labels_b: Tensor) -> Tensor:
    """Adjusted Rand index of two partitions of each channel (Hubert & Arabie, 1985).

    1 for equal partitions whatever their numbering, about 0 for independent ones; 1 also where
    both have one cluster or both have only clusters of one pixel.

    Args:
        labels_a: (C, ...), integers, one cluster number per pixel.
        labels_b: (C, ...), the same shape.

    Returns:
        (C,) float64, at most 1.

    Raises:
        ValueError: If the shapes differ, there is no pixel, or the labels are not integers.
    """
    if labels_a.shape != labels_b.shape:
        raise ValueError(
            "labels_a and labels_b must have the same shape; "
            f"got {tuple(labels_a.shape)} and {tuple(labels_b.shape)}"
        )
    if labels_a.dim() < 2 or labels_a.numel() == 0:
        raise ValueError(f"labels must be (C, ...), not empty; got {tuple(labels_a.shape)}")
    if labels_a.is_floating_point() or labels_b.is_floating_point():
        raise ValueError(f"labels must be integers; got {labels_a.dtype} and {labels_b.dtype}")
    a = _numbered_from_zero(labels_a)
    b = _numbered_from_zero(labels_b)
    n_pixels = torch.tensor(a.shape[1], dtype=torch.float64, device=a.device)
    both = _pairs_within(a * (b.max() + 1) + b)
    within_a, within_b = _pairs_within(a), _pairs_within(b)
    expected = within_a * within_b / _pairs(n_pixels).clamp(min=1)
    largest = (within_a + within_b) / 2
    trivial = largest == expected
    index = (both - expected) / torch.where(trivial, 1.0, largest - expected)
    return torch.where(trivial, 1.0, index)


def _numbered_from_zero(labels: Tensor) -> Tensor:
    """(C, N) int64, not negative."""
    flat = labels.flatten(1).to(torch.int64)
    return flat - flat.min()


def _pairs(size: Tensor) -> Tensor:
    return size * (size - 1) / 2


def _pairs_within(labels: Tensor) -> Tensor:
    """(C,) float64: the pairs of pixels with the same label in each row of (C, N)."""
    span = labels.max() + 1
    row = torch.arange(len(labels), device=labels.device)[:, None]
    cluster, size = torch.unique(row * span + labels, return_counts=True)
    pairs = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    return pairs.scatter_add_(0, cluster // span, _pairs(size.double()))
