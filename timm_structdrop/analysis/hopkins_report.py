"""Where in a model the activations are structured: Spatial Hopkins of every candidate layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from timm_structdrop.analysis.maps import Place, find_places, watch_maps
from timm_structdrop.cluster import spatial_hopkins
from timm_structdrop.errors import UserError

__all__ = ["HopkinsReport", "LayerHopkins", "hopkins_report"]

N_BINS = 40
VALUES_AT_ONCE = 2**24  # neighbours gathered at a time, which bounds the memory


@dataclass(frozen=True, eq=False)
class LayerHopkins:
    """Spatial Hopkins statistics of one layer's channels.

    Attributes:
        name: the module the layer's map comes from.
        kind: see :class:`timm_structdrop.analysis.maps.Place`.
        size: (H, W) of the map.
        per_channel: mean over the images, (C,) in [0, 1]; 0.5 without structure, 0 if constant.
    """

    name: str
    kind: str
    size: tuple[int, int]
    per_channel: Tensor

    @property
    def median(self) -> float:
        """Median over the channels, the mean of the two middle ones of an even number."""
        return float(self.per_channel.double().quantile(0.5))

    def histogram(self, bins: int = N_BINS) -> list[int]:
        """Channels in each of ``bins`` equal bins of [0, 1]."""
        return torch.histc(self.per_channel.double(), bins, 0.0, 1.0).long().tolist()

    def numbers(self) -> dict[str, Any]:
        """The layer's figures, JSON-able."""
        values = self.per_channel.double()
        return {
            "layer": self.name,
            "kind": self.kind,
            "channels": len(values),
            "height": self.size[0],
            "width": self.size[1],
            "median": self.median,
            "mean": float(values.mean()),
            "std": float(values.std(correction=0)),
            "min": float(values.min()),
            "max": float(values.max()),
            "histogram": self.histogram(),
            "per_channel": [round(value, 6) for value in values.tolist()],
        }


@dataclass(frozen=True, eq=False)
class HopkinsReport:
    """Spatial Hopkins statistics of a model's candidate layers.

    Attributes:
        layers: in the order of the forward pass.
        skipped: (H, W) of the maps smaller than 3x3, by layer name.
        n_images: images the statistics are means over.
        n_points: random pixels per image and channel.
        threshold: what the median of a structured layer reaches.
        n_clusters: pixels that a layer needs to be recommended.
    """

    layers: list[LayerHopkins]
    n_images: int
    n_points: int
    threshold: float
    n_clusters: int
    skipped: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def recommended(self) -> LayerHopkins | None:
        """The deepest layer that is still structured, or None where no layer is.

        A layer is structured where the median of its channels is at least ``threshold``. One whose
        maps have fewer than ``n_clusters`` pixels is passed over.
        """
        fit = [layer for layer in self.layers if self.is_structured(layer)]
        large = [layer for layer in fit if layer.size[0] * layer.size[1] >= self.n_clusters]
        return large[-1] if large else None

    def is_structured(self, layer: LayerHopkins) -> bool:
        """Whether the median of the layer's channels is at least ``threshold``."""
        return layer.median >= self.threshold

    def numbers(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {
            "statistic": "Spatial Hopkins per channel, mean over images; 0.5 = no structure",
            "n_images": self.n_images,
            "n_points": self.n_points,
            "threshold": self.threshold,
            "n_clusters": self.n_clusters,
            "recommended": self.recommended.name if self.recommended else None,
            "histogram_edges": [i / N_BINS for i in range(N_BINS + 1)],
            "layers": [
                {**layer.numbers(), "structured": self.is_structured(layer)}
                for layer in self.layers
            ],
            "skipped": [
                {"layer": name, "height": height, "width": width}
                for name, (height, width) in self.skipped.items()
            ],
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per layer and channel."""
        for layer in self.layers:
            for channel, value in enumerate(layer.per_channel.tolist()):
                yield {
                    "layer": layer.name,
                    "channel": channel,
                    "spatial_hopkins": round(value, 6),
                }


def hopkins_report(
    model: nn.Module,
    images: Tensor,
    *,
    layers: str = "stages",
    n_points: int = 64,
    threshold: float = 0.6,
    n_clusters: int = 15,
    batch_size: int = 64,
    seed: int = 0,
) -> HopkinsReport:
    """Spatial Hopkins statistic (Eqs. 3-5 of DropCluster) of every candidate layer's channels.

    The paper advises to look at these histograms to decide where DropCluster goes; they near 0.5 as
    layers get deeper. Maps are those of eval mode, before any regularizer at the place. Maps
    smaller than 3x3 have no interior pixel with 8 neighbours and are skipped.

    Args:
        model: a timm CNN.
        images: (N, C, H, W), normalised.
        layers: ``"stages"`` (the stem and the end of each stage) or ``"convs"`` (the stem and each
            convolution).
        n_points: random pixels per image and channel.
        threshold: in [0, 1], see :attr:`HopkinsReport.recommended`.
        n_clusters: pixels that a layer needs to be recommended: clusters of a DropCluster layer.
        batch_size: images per forward pass; no influence on more than the random pixels.
        seed: of the random pixels.

    Raises:
        UserError: an argument is out of range, the model is not a CNN, its activations are not
            finite, or every map is smaller than 3x3.
    """
    if not 0.0 <= threshold <= 1.0:
        raise UserError(f"the threshold must be in [0, 1]; got {threshold}")
    if n_points < 1:
        raise UserError(f"n_points must be at least 1; got {n_points}")
    sums: dict[str, Tensor] = {}
    found: dict[str, tuple[Place, tuple[int, int]]] = {}
    generators: dict[str, torch.Generator] = {}

    def add(place: Place, maps: Tensor) -> None:
        name, (height, width) = place.name, maps.shape[-2:]
        found[name] = place, (height, width)
        if min(height, width) < 3:
            return
        # one generator per layer, so that a figure does not depend on which layers are candidates
        generator = generators.setdefault(name, torch.Generator().manual_seed(seed))
        at_once = max(1, VALUES_AT_ONCE // (8 * n_points * maps.shape[1]))
        for part in maps.split(at_once):
            values = spatial_hopkins(part, n_points, generator).double().cpu() * len(part)
            if not bool(values.isfinite().all()):
                raise UserError(f"activations must be finite; {name} holds NaN or Inf")
            sums[name] = sums.get(name, torch.zeros_like(values)) + values

    watch_maps(model, find_places(model, _size(images), layers), images, add, batch_size)
    if not sums:
        sizes = ", ".join(f"{name} {h}x{w}" for name, (_, (h, w)) in found.items())
        raise UserError(f"maps must be at least 3x3 for Spatial Hopkins; got {sizes or 'none'}")
    return HopkinsReport(
        [
            LayerHopkins(name, place.kind, size, (sums[name] / len(images)).float())
            for name, (place, size) in found.items()
            if name in sums
        ],
        len(images),
        n_points,
        threshold,
        n_clusters,
        {name: size for name, (_, size) in found.items() if name not in sums},
    )


def _size(images: Tensor) -> tuple[int, int]:
    if images.ndim != 4 or len(images) == 0:
        raise UserError(f"images must be (N, C, H, W) with N >= 1; got {tuple(images.shape)}")
    return images.shape[2], images.shape[3]
