"""The one definition of "rescale what is kept"."""

import torch
from torch import Tensor

__all__ = ["apply_mask", "kept_scale"]


def kept_scale(mask: Tensor) -> Tensor:
    """count(M) / count_ones(M) of a 0/1 mask of any shape and dtype, as a 0-d float32 tensor.

    The count is summed in float32 whatever the mask's dtype: in float16 it overflows at 65504
    units and the scale becomes 0. A mask without ones gives ``count(M)``, a finite number, so that
    the masked activations are zero instead of NaN.
    """
    return mask.numel() / mask.sum(dtype=torch.float32).clamp(min=1.0)


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """``x * M * count(M) / count_ones(M)`` in the dtype of ``x``; M broadcasts against ``x``."""
    return x * (mask * kept_scale(mask)).to(x.dtype)
