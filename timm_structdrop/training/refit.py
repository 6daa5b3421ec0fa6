"""When DropCluster finds its clusters: by epoch, from the first mini-batch of that epoch."""

from __future__ import annotations

from typing import Any

from torch import nn

from timm_structdrop.errors import UserError
from timm_structdrop.layers import FittedLayer

__all__ = ["ClusterRefits"]


class ClusterRefits:
    """Asks every DropCluster layer of a model for its fits: at ``start``, ``start + every``, ...

    Epochs are counted from 0, so with the paper's 50 and 50 the first fit comes after 50 epochs
    without any dropping, on the first training mini-batch of epoch 50. When to fit is a function
    of the epoch alone and what was found is in the layers' buffers, so nothing is lost by a resume.

    Args:
        model: the model; its layers are remembered, so make this before wrapping it.
        start: the epoch of the first fit, at least 0.
        every: epochs from one fit to the next, at least 1.

    Raises:
        UserError: ``start`` or ``every`` is out of range, or the model has no DropCluster layer.
    """

    def __init__(self, model: nn.Module, start: int = 50, every: int = 50) -> None:
        if start < 0:
            raise UserError(f"the epoch of the first cluster fit must be at least 0; got {start}")
        if every < 1:
            raise UserError(f"epochs between cluster fits must be at least 1; got {every}")
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, FittedLayer)
        }
        if not self.layers:
            raise UserError("cluster refits need a model with DropCluster2d layers; got none")
        self.start = start
        self.every = every
        self.pending = False

    def due(self, epoch: int) -> bool:
        """Whether clusters are fitted in ``epoch``."""
        return epoch >= self.start and (epoch - self.start) % self.every == 0

    def request(self, epoch: int) -> None:
        """Make every layer fit itself in the next training forward, whether due or not."""
        for layer in self.layers.values():
            layer.request_fit(at=epoch)
        self.pending = True

    def done(self) -> None:
        """Note that the forward in which the layers fitted themselves is over."""
        self.pending = False

    def report(self, epoch: int) -> dict[str, dict[str, Any]]:
        """What the fits of ``epoch`` found, by layer name; empty when there was none.

        The facts are those of ``FittedLayer.last_fit``: clusters, channels, unstructured
        channels, the adjusted Rand index with the partition before (None at the first fit) and
        seconds. A layer whose fit was refused (it warned) is left out.
        """
        return {
            name: layer.last_fit
            for name, layer in self.layers.items()
            if layer.last_fit is not None and layer.last_fit["at"] == epoch
        }

    def summary(self) -> dict[str, int | str]:
        """The columns of summary.csv, read from the layers' buffers: the epoch of the last fit
        (empty before the first) and the unstructured channels, over all layers."""
        fitted = max(int(layer.fitted_at) for layer in self.layers.values())
        unstructured = sum(int((~layer.structured).sum()) for layer in self.layers.values())
        return {
            "clusters_fitted_at": fitted if fitted >= 0 else "",
            "unstructured_channels": unstructured,
        }
