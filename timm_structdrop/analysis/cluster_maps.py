"""What a DropCluster layer has learned, in numbers: its clusters and one training step's mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timm_structdrop.analysis.maps import cluster_layers, cluster_places, collect_maps
from timm_structdrop.errors import UserError
from timm_structdrop.layers import FittedLayer

__all__ = ["ClusterMaps", "TrainingMask", "cluster_maps", "training_mask"]


@dataclass(frozen=True, eq=False)
class ClusterMaps:
    """The clusters of one DropCluster layer.

    Attributes:
        name: the place of the layer.
        labels: cluster of each pixel, (C, H, W) int64; 0 in unstructured channels.
        structured: False for the channels that are masked, (C,) bool.
        n_clusters: clusters per structured channel.
        drop_prob: the layer's target rate.
        fitted_at: epoch or update of the fit.
        images: the sample images as the model gets them, (S, C', H', W').
        features: the layer's input for them in eval mode, (S, C, h, w).
    """

    name: str
    labels: Tensor
    structured: Tensor
    n_clusters: int
    drop_prob: float
    fitted_at: int
    images: Tensor
    features: Tensor

    def sizes(self) -> Tensor:
        """Pixels of each cluster, (C, n_clusters) int64; zeros for unstructured channels."""
        channels = len(self.labels)
        sizes = torch.zeros(channels, self.n_clusters, dtype=torch.int64)
        labels = self.labels.flatten(1)
        sizes.scatter_add_(1, labels, torch.ones_like(labels))
        return sizes * self.structured[:, None]

    def numbers(self) -> dict[str, Any]:
        """The layer's figures, JSON-able, without the labels."""
        channels, height, width = self.labels.shape
        unstructured = (~self.structured).nonzero().flatten().tolist()
        sizes = self.sizes()[self.structured].double()
        return {
            "layer": self.name,
            "channels": channels,
            "height": height,
            "width": width,
            "n_clusters": self.n_clusters,
            "drop_prob": self.drop_prob,
            "fitted_at": self.fitted_at,
            "unstructured": len(unstructured),
            "unstructured_channels": unstructured,
            "mean_cluster_pixels": float(sizes[sizes > 0].mean()) if len(sizes) else None,
            "mean_largest_cluster_pixels": float(sizes.amax(1).mean()) if len(sizes) else None,
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per channel: whether it is structured, and the pixels of its clusters."""
        for channel, (structured, sizes) in enumerate(
            zip(self.structured.tolist(), self.sizes().tolist(), strict=True)
        ):
            found = sorted((size for size in sizes if size), reverse=True)
            yield {
                "layer": self.name,
                "channel": channel,
                "structured": int(structured),
                "clusters": len(found),
                "pixels_of_clusters": " ".join(map(str, found)),
            }

    def label_rows(self) -> Iterator[dict[str, Any]]:
        """One row per channel and line of the map: the labels as one string of numbers."""
        for channel, lines in enumerate(self.labels.tolist()):
            for y, line in enumerate(lines):
                yield {
                    "layer": self.name,
                    "channel": channel,
                    "y": y,
                    "labels": " ".join(map(str, line)),
                }


@dataclass(frozen=True, eq=False)
class TrainingMask:
    """The mask M of one training step (Algorithm 2).

    Attributes:
        kept: True where units are kept, (C, H, W) bool.
        dropped: the clusters dropped in each channel.
        scale: count(M) / count_ones(M), what is kept is multiplied by.
    """

    kept: Tensor
    dropped: list[list[int]]
    scale: float

    def numbers(self) -> dict[str, Any]:
        """The mask's figures, JSON-able; ``dropped`` and the labels are the mask itself."""
        return {
            "kept_fraction": float(self.kept.double().mean()),
            "scale": self.scale,
            "dropped_clusters": self.dropped,
        }


def cluster_maps(
    model: nn.Module, images: Tensor, n_samples: int = 2, batch_size: int = 64
) -> list[ClusterMaps]:
    """The clusters of every fitted DropCluster layer, and the maps of sample images.

    Args:
        model: with DropCluster layers.
        images: (N, C, H, W), normalised; the first ``n_samples`` of them are the samples.
        n_samples: at least 1.
        batch_size: images per forward pass.

    Raises:
        UserError: a layer is not fitted.
    """
    found = []
    for place in cluster_places(model):
        layer = _fitted(model, place.name)
        samples = images[:n_samples]
        found.append(
            ClusterMaps(
                place.name,
                layer.labels.long().cpu(),
                layer.structured.cpu(),
                layer.n_clusters,
                layer.target_drop_prob,
                int(layer.fitted_at),
                samples.float().cpu(),
                collect_maps(model, place, samples, batch_size),
            )
        )
    return found


def training_mask(model: nn.Module, name: str, seed: int = 0) -> TrainingMask:
    """The mask of one training step of the layer at place ``name``, at its target rate.

    Args:
        model: with a fitted DropCluster layer there.
        name: of the place.
        seed: of the clusters drawn; torch's own random numbers stay where they are.

    Raises:
        UserError: there is no such layer, or it is not fitted.
    """
    layer = _fitted(model, name)
    labels, structured = layer.labels.cpu(), layer.structured.cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kept = layer.draw_mask()
    dropped = [
        sorted(set(of_channel[~mask].tolist())) if usable else []
        for of_channel, mask, usable in zip(labels, kept, structured.tolist(), strict=True)
    ]
    return TrainingMask(kept, dropped, kept.numel() / max(1, int(kept.sum())))


def _fitted(model: nn.Module, name: str) -> FittedLayer:
    layer = cluster_layers(model).get(name)
    if layer is None:
        raise UserError(f"clusters need a DropCluster layer; there is none at {name}")
    if not layer.is_fitted:
        raise UserError(f"clusters must have been found; the layer at {name} is not fitted")
    return layer
