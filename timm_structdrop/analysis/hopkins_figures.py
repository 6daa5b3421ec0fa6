"""Pictures of Spatial Hopkins statistics, from the numbers of a report."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from timm_structdrop.analysis.figure import new_figure
from timm_structdrop.analysis.hopkins_report import N_BINS, HopkinsReport, LayerHopkins
from timm_structdrop.words import counted

__all__ = ["draw_hopkins_histograms", "draw_hopkins_map"]

RECOMMENDED, OTHER, LINE = "#0b6e4f", "#8da0b3", "#b2182b"
MOST_CELLS_WITH_TEXT = 256
LONGEST_NAME = 34


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
