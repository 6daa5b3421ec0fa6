"""The one definition of "rescale what is kept"."""

from __future__ import annotations

import torch
from torch import Tensor

from timm_structdrop.layers._check import check_drop_prob

__all__ = ["apply_mask", "bernoulli_scale", "drop_alike", "kept_scale"]


def kept_scale(mask: Tensor) -> Tensor:
    """count(M) / count_ones(M).

    The count is summed in float32 whatever the mask's dtype: in float16 it overflows at 65504
    units and the scale becomes 0. A mask without ones gives ``count(M)``, a finite number, so that
    the masked activations are zero instead of NaN.

    Args:
        mask: M, zeros and ones of any shape and dtype.

    Returns:
        A 0-d float32 tensor.
    """
    return mask.numel() / mask.sum(dtype=torch.float32).clamp(min=1.0)


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """``x * M * count(M) / count_ones(M)``.

    Args:
        x: activations of any shape.
        mask: M, zeros and ones of a shape that broadcasts against that of ``x``.

    Returns:
        The shape, dtype and memory format of ``x``.
    """
    return x * (mask * kept_scale(mask)).to(x.dtype)


def bernoulli_scale(shape: tuple[int, ...], drop_prob: float | Tensor, like: Tensor) -> Tensor:
    """Independent factors: 0 with probability p, else 1 / (1 - p), so that their mean is 1.

    Args:
        shape: the shape of the result.
        drop_prob: p in [0, 1), a float or a 0-d tensor; not checked.
        like: the tensor whose device and dtype the factors have.
    """
    # float32 whatever the activations: float16 uniforms would round the rate
    kept = torch.rand(shape, device=like.device, dtype=torch.float32) >= drop_prob
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
