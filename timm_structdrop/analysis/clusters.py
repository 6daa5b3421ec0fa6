"""What a DropCluster layer has learned: its clusters and one training step's mask, in numbers and
in the pictures of these."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from timm_structdrop.analysis.figure import colour_bar, new_figure, picture, scaled
from timm_structdrop.analysis.maps import cluster_layers, cluster_places, collect_maps
from timm_structdrop.errors import UserError
from timm_structdrop.layers import FittedLayer
from timm_structdrop.words import counted

__all__ = [
    "ClusterMaps",
    "TrainingMask",
    "cluster_maps",
    "colour_labels",
    "draw_cluster_maps",
    "draw_training_mask",
    "training_mask",
]

MOST_CHANNELS, MOST_LARGE = 128, 32  # that are drawn, and drawn large
MARK, MASKED, DROPPED = "#d7191c", (0.88, 0.88, 0.88), (0.0, 0.0, 0.0)
GAP, NUMBER_HEIGHT, BAND_GAP = 0.07, 0.22, 0.05
# Twenty colours of different hue and lightness; grey and pure red are kept for marks.
HEX = (
    "1f77b4ff7f0e2ca02c9467bd8c564be377c2bcbd2217becfaec7e8ffbb78"
    "98df8ac5b0d5c49c94f7b6d2dbdb8d9edae508306b00441b7f2704fde725"
)
PALETTE = np.frombuffer(bytes.fromhex(HEX), dtype=np.uint8).reshape(-1, 3) / 255


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


@dataclass(frozen=True)
class Sheet:
    """Channels as tiles in bands, one below the other, on one axis in units of a tile's width.

    Attributes:
        channels: how many are shown.
        columns: channels side by side.
        tile_rows: tiles of each channel, one below the other.
        aspect: height of a tile.
        left: width of what stands left of the channels, 0 for nothing.
    """

    channels: int
    columns: int
    tile_rows: int
    aspect: float
    left: float

    @classmethod
    def of(cls, channels: int, tile_rows: int, size: tuple[int, int], left: float) -> Sheet:
        bands = math.ceil(channels / (8 if channels <= MOST_LARGE else 16))
        return cls(channels, math.ceil(channels / bands), tile_rows, size[0] / size[1], left)

    @property
    def bands(self) -> int:
        return math.ceil(self.channels / self.columns)

    @property
    def band_height(self) -> float:
        return NUMBER_HEIGHT + self.tile_rows * (self.aspect + GAP) + BAND_GAP

    @property
    def width(self) -> float:
        return self.left + self.columns * (1 + GAP)

    @property
    def height(self) -> float:
        return self.bands * self.band_height

    def box(self, band: int, row: int, column: float) -> tuple[float, float, float, float]:
        """(left, right, bottom, top) of a tile; y grows downwards."""
        x = self.left + column * (1 + GAP)
        y = band * self.band_height + NUMBER_HEIGHT + row * (self.aspect + GAP)
        return x, x + 1, y + self.aspect, y


def draw_cluster_maps(maps: ClusterMaps, model_name: str) -> Any:
    """Figs. 1-3 of the paper: every channel's clusters below its maps of sample images.

    Without sample images the clusters stand alone. Unstructured channels are grey with a red X. At
    most 128 channels are drawn.

    Args:
        maps: the numbers.
        model_name: for the title.

    Returns:
        A matplotlib figure.
    """
    shown = min(len(maps.labels), MOST_CHANNELS)
    samples = len(maps.images)
    height, width = maps.labels.shape[1:]
    sheet = Sheet.of(shown, samples + 1, (height, width), left=1.35)
    unstructured = int((~maps.structured).sum())
    structured = counted(len(maps.labels) - unstructured, "structured channel")
    title = (
        f"Clusters that DropCluster found at {maps.name} of {model_name}\n"
        f"{counted(maps.n_clusters, 'cluster')} in each of {structured}, "
        f"{unstructured} unstructured{_left_out(shown, len(maps.labels))}"
    )
    figure, axis, colour_axis = _open(sheet, title, footer=0.5)
    for band in range(sheet.bands):
        for row in range(samples):
            _draw_picture(axis, picture(maps.images[row]), sheet.box(band, row, -1.17))
        _write(axis, sheet.box(band, samples, -1.17), "clusters")
    for channel in range(shown):
        band, column = divmod(channel, sheet.columns)
        _number(axis, sheet.box(band, 0, column), channel)
        features = maps.features[:, channel].double().numpy()
        for row, tile in enumerate(scaled(features) if samples else ()):
            extent = sheet.box(band, row, column)
            axis.imshow(tile, cmap="viridis", vmin=0, vmax=1, extent=extent)
        box = sheet.box(band, samples, column)
        if maps.structured[channel]:
            axis.imshow(
                colour_labels(maps.labels[channel].numpy()), extent=box, interpolation="nearest"
            )
        else:
            _cross_out(axis, box)
    _finish(axis, sheet)
    if samples:
        words = {0.0: "channel's lowest", 1.0: "highest activation"}
        colour_bar(figure, colour_axis, "viridis", words)
    else:
        colour_axis.set_axis_off()
    _legend(figure, unstructured > 0, "colours: clusters (those that touch differ)", False)
    return figure


def draw_training_mask(maps: ClusterMaps, mask: TrainingMask, model_name: str) -> Any:
    """Fig. 6 of the paper: the clusters that one training step drops, black on the pale clusters.

    Args:
        maps: the numbers of the layer.
        mask: the numbers of the step.
        model_name: for the title.

    Returns:
        A matplotlib figure.
    """
    shown = min(len(maps.labels), MOST_CHANNELS)
    height, width = maps.labels.shape[1:]
    sheet = Sheet.of(shown, 1, (height, width), left=0.0)
    kept = float(mask.kept.double().mean())
    title = (
        f"Mask of one training step at {maps.name} of {model_name}\n"
        f"p = {maps.drop_prob:g}: {100 * (1 - kept):.1f} % of the units are zero, "
        f"the others x {mask.scale:.3f}{_left_out(shown, len(maps.labels))}"
    )
    figure, axis, colour_axis = _open(sheet, title, footer=0.34)
    colour_axis.set_axis_off()
    for channel in range(shown):
        band, column = divmod(channel, sheet.columns)
        box = sheet.box(band, 0, column)
        _number(axis, box, channel)
        if not maps.structured[channel]:
            _cross_out(axis, box)
            continue
        pale = 0.45 * colour_labels(maps.labels[channel].numpy()) + 0.55
        pale[~mask.kept[channel].numpy()] = DROPPED
        axis.imshow(pale, extent=box, interpolation="nearest")
    _finish(axis, sheet)
    unstructured = not bool(maps.structured.all())
    _legend(figure, unstructured, "pale colours: clusters that are kept", True)
    return figure


def _left_out(shown: int, channels: int) -> str:
    return "" if shown == channels else f"; shown are channels 0 to {shown - 1}"


def _open(sheet: Sheet, title: str, footer: float) -> tuple[Any, Any, Any]:
    """Figure, the axis of the tiles and a small one for a colour bar, in a footer of so many
    inches."""
    tile = 1.15 if sheet.columns <= 8 else 0.78
    sheet_width, sheet_height = tile * sheet.width, tile * sheet.height
    header, margin = 0.56, 0.2
    width, height = max(sheet_width + 2 * margin, 7.6), sheet_height + header + footer
    figure = new_figure(width, height)
    left = (width - sheet_width) / 2
    axis = figure.add_axes(
        (left / width, footer / height, sheet_width / width, sheet_height / height)
    )
    colour_axis = figure.add_axes((0.75 / width, 0.3 / height, 1.5 / width, 0.12 / height))
    figure.suptitle(title, fontsize=11, y=1 - 0.12 / height, va="top")
    return figure, axis, colour_axis


def _finish(axis: Any, sheet: Sheet) -> None:
    axis.set_xlim(0, sheet.width)
    axis.set_ylim(sheet.height, 0)
    axis.set_axis_off()


def _draw_picture(axis: Any, picture: Any, box: tuple[float, float, float, float]) -> None:
    """As large as it fits into the box, in the middle."""
    left, right, bottom, top = box
    height, width = picture.shape[:2]
    scale = min((right - left) / width, (bottom - top) / height)
    x, y = (left + right) / 2, (top + bottom) / 2
    half = scale * width / 2, scale * height / 2
    axis.imshow(picture, extent=(x - half[0], x + half[0], y + half[1], y - half[1]))


def _number(axis: Any, box: tuple[float, float, float, float], channel: int) -> None:
    axis.text(
        (box[0] + box[1]) / 2, box[3] - 0.05, str(channel), fontsize=8, ha="center", va="bottom"
    )


def _write(axis: Any, box: tuple[float, float, float, float], text: str) -> None:
    axis.text(box[1], (box[2] + box[3]) / 2, text, fontsize=8, ha="right", va="center")


def _cross_out(axis: Any, box: tuple[float, float, float, float]) -> None:
    left, right, bottom, top = box
    axis.imshow(np.full((1, 1, 3), MASKED), extent=box)
    inset = 0.12 * min(right - left, bottom - top)
    for ends in ((top + inset, bottom - inset), (bottom - inset, top + inset)):
        axis.plot((left + inset, right - inset), ends, color=MARK, linewidth=2)


def _legend(figure: Any, unstructured: bool, colours: str, dropped: bool) -> None:
    lines = import_module("matplotlib.lines")
    patches = import_module("matplotlib.patches")
    handles = [lines.Line2D([], [], linestyle="none", label=colours)]
    if dropped:
        handles.append(patches.Patch(color=DROPPED, label="dropped cluster"))
    if unstructured:
        handles.append(
            lines.Line2D(
                [],
                [],
                color=MARK,
                marker="x",
                linestyle="none",
                markeredgewidth=2,
                label="unstructured channel, always zero",
            )
        )
    figure.legend(handles=handles, loc="lower right", ncols=3, frameon=False, fontsize=8)


def colour_labels(labels: NDArray[np.integer]) -> NDArray[np.floating]:
    """An RGB picture of a label map, (H, W) to (H, W, 3) in [0, 1].

    Clusters get their colours in the order of their numbers: one that no touching cluster has
    (corners touch too), of these one used least so far, of these the one most unlike those that
    touch. Up to 20 clusters all have colours of their own.
    """
    names, flat = np.unique(labels, return_inverse=True)
    index = flat.reshape(labels.shape)
    touching = _touching(index, len(names))
    chosen = np.full(len(names), -1)
    used = np.zeros(len(PALETTE))
    for cluster in range(len(names)):
        around = chosen[touching[cluster] & (chosen >= 0)]
        cost = used * 10.0
        if len(around):
            distance = np.abs(PALETTE[:, None] - PALETTE[around]).sum(-1).min(1)
            cost = cost - distance + 1e6 * (distance == 0)
        chosen[cluster] = int(cost.argmin())
        used[chosen[cluster]] += 1
    return PALETTE[chosen][index]


def _touching(index: NDArray[np.integer], n: int) -> NDArray[np.bool_]:
    """Which clusters share an edge or a corner, (n, n)."""
    touching = np.zeros((n, n), dtype=bool)
    for a, b in (
        (index[1:], index[:-1]),
        (index[:, 1:], index[:, :-1]),
        (index[1:, 1:], index[:-1, :-1]),
        (index[1:, :-1], index[:-1, 1:]),
    ):
        touching[a, b] = touching[b, a] = True
    np.fill_diagonal(touching, False)
    return touching
