"""Where in a model the activations are structured: Spatial Hopkins of every candidate layer, in
numbers and in the pictures of these."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from timm_structdrop.analysis.figure import new_figure
from timm_structdrop.analysis.maps import Place, find_places, watch_maps
from timm_structdrop.cluster import spatial_hopkins
from timm_structdrop.errors import UserError
from timm_structdrop.words import counted

__all__ = [
    "HopkinsReport",
    "LayerHopkins",
    "draw_hopkins_histograms",
    "draw_hopkins_map",
    "hopkins_report",
]

N_BINS = 40
VALUES_AT_ONCE = 2**24  # neighbours gathered at a time, which bounds the memory
RECOMMENDED, OTHER, LINE = "#0b6e4f", "#8da0b3", "#b2182b"
MOST_CELLS_WITH_TEXT = 256
LONGEST_NAME = 34


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


def draw_hopkins_histograms(report: HopkinsReport, model_name: str) -> Any:
    """Fig. 8 of the paper: one histogram of the channels for each candidate layer.

    Args:
        report: the numbers.
        model_name: for the title.

    Returns:
        A matplotlib figure.
    """
    n = len(report.layers)
    columns = n if n <= 4 else 3 if n <= 9 else 4 if n <= 24 else 6
    rows = math.ceil(n / columns)
    header = 0.95
    width, height = max(3.1 * columns, 7.2), 2.3 * rows + header
    figure = new_figure(width, height)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, layer in zip(axes, report.layers, strict=False):
        _draw_histogram(axis, layer, report)
    for axis in axes[n:]:
        axis.set_axis_off()
    for index, axis in enumerate(axes[:n]):
        if index % columns == 0:
            axis.set_ylabel("channels")
        if index + columns >= n:
            axis.set_xlabel("Spatial Hopkins")
    best = report.recommended
    advice = f"deepest structured layer: {best.name}" if best else "no layer is structured"
    figure.text(
        0.5,
        1 - 0.12 / height,
        f"Spatial Hopkins of each layer's channels in {model_name}\n"
        f"{advice} (median at least {report.threshold:g}; {counted(report.n_images, 'image')})",
        fontsize=12,
        ha="center",
        va="top",
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - 0.55 / height),
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - (header - 0.1) / height), h_pad=1.2, w_pad=1.2)
    return figure


def _draw_histogram(axis: Any, layer: LayerHopkins, report: HopkinsReport) -> None:
    recommended = layer is report.recommended
    colour = RECOMMENDED if recommended else OTHER
    counts = np.asarray(layer.histogram())
    edges = np.arange(N_BINS + 1) / N_BINS
    axis.stairs(counts, edges, fill=True, color=colour)
    axis.axvline(0.5, color="black", linestyle=":", linewidth=1.2, label="0.5: no structure")
    axis.axvline(
        report.threshold,
        color=LINE,
        linestyle="--",
        linewidth=1.2,
        label=f"{report.threshold:g}: threshold",
    )
    axis.axvline(layer.median, color="black", linewidth=1.6, label="median channel")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, max(1.0, counts.max() * 1.12))
    axis.yaxis.get_major_locator().set_params(integer=True, nbins=4)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    name = layer.name if len(layer.name) <= LONGEST_NAME else f"...{layer.name[3 - LONGEST_NAME :]}"
    channels = counted(len(layer.per_channel), "channel")
    facts = f"{channels}, {layer.size[0]}x{layer.size[1]}"
    axis.set_title(
        f"{'recommended:' if recommended else ''}\n{name}\n{facts}, median {layer.median:.3f}",
        fontsize=8.5,
        color=RECOMMENDED if recommended else "black",
        fontweight="bold" if recommended else "normal",
    )


def draw_hopkins_map(layer: LayerHopkins, model_name: str, n_images: int) -> Any:
    """Fig. 4 of the paper: the mean statistic of every channel, as a map.

    Args:
        layer: the numbers.
        model_name: for the title.
        n_images: that the means are over, for the title.

    Returns:
        A matplotlib figure.
    """
    values = layer.per_channel.double().numpy()
    channels = len(values)
    columns = channels if channels <= 8 else math.ceil(math.sqrt(channels))
    rows = math.ceil(channels / columns)
    grid = np.full(rows * columns, np.nan)
    grid[:channels] = values
    with_text = channels <= MOST_CELLS_WITH_TEXT
    cell = 0.62 if with_text else 12 / columns
    width, height = max(cell * columns + 1.5, 5.6), cell * rows + 1.05
    figure = new_figure(width, height)
    left = (width - cell * columns - 1.0) / 2
    axis = figure.add_axes(
        (left / width, 0.35 / height, cell * columns / width, cell * rows / height)
    )
    image = axis.imshow(grid.reshape(rows, columns), cmap="viridis", vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])
    if with_text:
        for channel, value in enumerate(values):
            colour = "black" if value > 0.55 else "white"
            y, x = divmod(channel, columns)
            axis.text(
                x, y - 0.26, str(channel), color=colour, fontsize=6.5, ha="center", va="center"
            )
            axis.text(
                x, y + 0.12, f"{value:.2f}", color=colour, fontsize=9, ha="center", va="center"
            )
    bar_axis = figure.add_axes(
        ((left + cell * columns + 0.15) / width, 0.35 / height, 0.16 / width, cell * rows / height)
    )
    figure.colorbar(image, cax=bar_axis, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar_axis.tick_params(labelsize=8)
    what = "small number: channel; 0.5 = no structure, 0 = constant"
    figure.suptitle(
        f"Mean Spatial Hopkins of each channel of {layer.name}\n"
        f"{model_name}, {counted(n_images, 'image')}",
        fontsize=11,
        y=1 - 0.1 / height,
        va="top",
    )
    figure.text(0.5, 0.1 / height, what, fontsize=8, ha="center", va="bottom")
    return figure
