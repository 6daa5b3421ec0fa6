"""Pictures of a DropCluster layer: its clusters, and the mask of one training step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from torch import Tensor

from timm_structdrop.analysis.cluster_maps import ClusterMaps, TrainingMask
from timm_structdrop.analysis.colours import colour_labels
from timm_structdrop.analysis.figure import new_figure
from timm_structdrop.words import counted

__all__ = ["draw_cluster_maps", "draw_training_mask", "picture"]

MOST_CHANNELS, MOST_LARGE = 128, 32  # that are drawn, and drawn large
MARK, MASKED, DROPPED = "#d7191c", (0.88, 0.88, 0.88), (0.0, 0.0, 0.0)
GAP, NUMBER_HEIGHT, BAND_GAP = 0.07, 0.22, 0.05


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
        for row, scaled in enumerate(_scaled(features) if samples else ()):
            extent = sheet.box(band, row, column)
            axis.imshow(scaled, cmap="viridis", vmin=0, vmax=1, extent=extent)
        box = sheet.box(band, samples, column)
        if maps.structured[channel]:
            axis.imshow(
                colour_labels(maps.labels[channel].numpy()), extent=box, interpolation="nearest"
            )
        else:
            _cross_out(axis, box)
    _finish(axis, sheet)
    if samples:
        scale = import_module("matplotlib.cm").ScalarMappable(cmap="viridis")
        bar = figure.colorbar(scale, cax=colour_axis, orientation="horizontal", ticks=[0, 1])
        bar.ax.set_xticklabels(["channel's lowest", "highest activation"], fontsize=8)
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


def picture(image: Tensor) -> Any:
    """A model's input as a picture: colours where it has three channels, else their mean."""
    pixels = image.double().permute(1, 2, 0).numpy()
    return _scaled(pixels if pixels.shape[2] == 3 else pixels.mean(2, keepdims=True).repeat(3, 2))


def _scaled(values: Any) -> Any:
    """From the lowest value at 0 to the highest at 1; zeros where all are the same."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


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
