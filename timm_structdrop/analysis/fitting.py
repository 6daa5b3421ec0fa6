"""Fitting a model's DropCluster layers on one mini-batch, outside of any training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from timm_structdrop.analysis.maps import cluster_layers
from timm_structdrop.errors import UserError
from timm_structdrop.layers import FittedLayer
from timm_structdrop.models.modes import eval_mode

__all__ = ["fit_clusters"]

FITTED_STATE = ("labels", "structured", "fitted_at", "fitted_size")


class _Stop(Exception):
    """Ends the forward pass after the last DropCluster layer."""


def fit_clusters(model: nn.Module, images: Tensor, at: int = 0) -> dict[str, dict[str, Any]]:
    """Fit every DropCluster layer of a model on one mini-batch of images.

    The activations are those of a training step: one forward pass in training mode, so batch norms
    normalise by the batch and, with several layers, each sees what the ones before it leave over.
    Nothing but the layers' clusters changes: running statistics and training flags are put back.

    Args:
        model: with at least one ``DropCluster2d``.
        images: (B, C, H, W), normalised.
        at: what to record as the time of the fit.

    Returns:
        ``DropCluster2d.last_fit`` by place: clusters, channels, unstructured channels, seconds.

    Raises:
        UserError: the model has no such layer, or one of them finds no clusters (activations that
            are not finite, or no channel with structure).
    """
    layers = cluster_layers(model)
    if not layers:
        raise UserError(
            f"a model to fit must have a DropCluster layer; {type(model).__name__} has none"
        )
    passed: set[nn.Module] = set()

    def stop_after_last(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        passed.add(module)
        if len(passed) == len(layers):
            raise _Stop

    weight = next(model.parameters())
    with (
        eval_mode(model, [model]),  # for its flags; all of it is in training mode
        _buffers_put_back(model),
        warnings.catch_warnings(record=True) as refusals,
        torch.no_grad(),
        ExitStack() as hooks,
    ):
        warnings.simplefilter("always")
        try:
            for layer in layers.values():
                layer.last_fit = None
                layer.request_fit(at)
                hooks.enter_context(layer.register_forward_hook(stop_after_last))
            model(images.to(device=weight.device, dtype=weight.dtype))
        except _Stop:
            pass
        except ValueError as error:
            raise UserError(str(error)) from error
    facts = {}
    for name, layer in layers.items():
        if layer.last_fit is None:
            reasons = "; ".join(str(refusal.message) for refusal in refusals) or "it never ran"
            raise UserError(f"{name} must have activations with clusters; {reasons}")
        facts[name] = layer.last_fit
    return facts


@contextmanager
def _buffers_put_back(model: nn.Module) -> Iterator[None]:
    """Put buffers back afterwards, except what a DropCluster layer has fitted.

    So a forward pass in training mode does not move the running statistics of batch norms.
    """
    kept = [
        (buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if not (isinstance(module, FittedLayer) and name in FITTED_STATE)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
