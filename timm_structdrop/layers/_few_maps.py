"""Dropping units in few of the maps: only those are written, the others are scaled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["drop_in_maps"]


def drop_in_maps(x: Tensor, samples: Tensor, chosen: Tensor, dropped: Tensor) -> Tensor:
    """``x`` without the dropped units, what is kept multiplied by CHW / count_ones(M) per sample.

    Args:
        x: activations (B, C, H, W).
        samples: the sample of each of R maps, (R,) int64; or numbers 0 to B - 1, (B, 1), and each
            sample has n' maps. The second has no data-dependent shapes and can be compiled.
        chosen: the channel of each of these maps, (R,) or (B, n') int64, no map twice.
        dropped: these maps (R, H, W) or (B, n', H, W), True where a unit is dropped.

    Returns:
        (B, C, H, W) in the dtype and memory format of ``x``.
    """
    scale = _scale(x, samples, dropped)
    if torch.compiler.is_compiling():
        return x * _factors(x, scale, chosen, dropped)
    out: Tensor = _ScaleAndDrop.apply(x, scale, samples, chosen, dropped)
    return out


def _scale(x: Tensor, samples: Tensor, dropped: Tensor) -> Tensor:
    """CHW / count_ones(M) of each sample, (B, 1, 1, 1) in the dtype of ``x``.

    In float32, as float16 overflows at 65504 units. A sample that loses all is zero and not NaN.
    """
    n_dropped = dropped.sum((-2, -1), dtype=torch.float32)
    if samples.ndim == 1:
        n_dropped = n_dropped.new_zeros(len(x)).index_add_(0, samples, n_dropped)
    else:
        n_dropped = n_dropped.sum(1)
    units = x.shape[1] * x.shape[2] * x.shape[3]
    return (units / (units - n_dropped).clamp(min=1.0)).to(x.dtype)[:, None, None, None]


def _factors(x: Tensor, scale: Tensor, chosen: Tensor, dropped: Tensor) -> Tensor:
    """What ``x`` is multiplied by: ``scale``, and 0 where a chosen map (B, n') has dropped units.

    Each map looks up its factors in a list of those of the chosen maps and of one that keeps all:
    a pointwise expression, which a compiler fuses with the product.
    """
    factors = torch.where(dropped, 0.0, scale)
    factors = torch.cat([factors, scale.expand(-1, 1, *x.shape[2:])], 1)
    n = chosen.shape[1]
    numbers = torch.arange(n, device=x.device).expand_as(chosen)
    numbers = chosen.new_full(x.shape[:2], n).scatter(1, chosen, numbers)
    return factors.gather(1, numbers[:, :, None, None].expand_as(x))


class _ScaleAndDrop(torch.autograd.Function):
    """``x * scale`` with zeros where the maps ``[samples, chosen]`` of x have dropped units.

    Only these maps are written again, and no mask of all maps waits for the backward pass.
    """

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, samples: Tensor, chosen: Tensor, dropped: Tensor
    ) -> Tensor:
        out = x * scale
        out[samples, chosen] = out[samples, chosen].masked_fill_(dropped, 0.0)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ScaleAndDrop.apply(grad, *ctx.saved_tensors), None, None, None, None
