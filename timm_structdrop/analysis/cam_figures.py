"""Pictures of class activation maps: the same images seen by several models."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from timm_structdrop.analysis.cams import Cams
from timm_structdrop.analysis.cluster_figures import picture
from timm_structdrop.analysis.figure import new_figure

__all__ = ["draw_cams"]

CELL, GAP, TEXT, LABEL = 1.3, 0.1, 0.24, 1.75  # inches
HALF, RIGHT, WRONG = "white", "black", "#b2182b"
OPACITY = 0.6
LONGEST = 20  # characters of a line left of a row


def draw_cams(images: Tensor, models: Mapping[str, Cams], class_names: Sequence[str]) -> Any:
    """Fig. 3 of CamDrop and Fig. 6 of DropBlock: the maps of the first images, a row per model.

    Each map is scaled to its own maximum, below which zero and less look the same; the white line
    is half of the maximum. Beneath it stands the fraction of the image within that line, and in red
    what the model says where that is not the target.

    Args:
        images: the S images to draw, (S, C, H, W).
        models: each model's maps by its name, of at least S images, these first.
        class_names: by class.

    Returns:
        A matplotlib figure.
    """
    shown = len(images)
    header, footer = 0.7, 0.5
    width = max(LABEL + shown * (CELL + GAP) + 0.15, 6.2)
    row_height = CELL + TEXT + GAP
    height = header + footer + (1 + len(models)) * row_height
    figure = new_figure(width, height)

    def cell(row: int, column: int) -> Any:
        left = LABEL + column * (CELL + GAP)
        top = header + row * row_height
        axis = figure.add_axes(
            (left / width, 1 - (top + CELL) / height, CELL / width, CELL / height)
        )
        axis.set_axis_off()
        return axis

    def label(row: int, text: str) -> None:
        y = 1 - (header + row * row_height + CELL / 2) / height
        figure.text((LABEL - 0.1) / width, y, text, ha="right", va="center", fontsize=8.5)

    label(0, "image")
    for column in range(shown):
        target = int(next(iter(models.values())).target[column])
        axis = cell(0, column)
        axis.imshow(picture(images[column]))
        _write(axis, class_names[target], RIGHT)
    for row, (name, cams) in enumerate(models.items(), start=1):
        label(row, _summary(name, cams))
        areas = cams.area()[:shown].tolist()
        for column, predicted in enumerate(cams.predicted[:shown].tolist()):
            axis = cell(row, column)
            _draw_map(axis, images[column], cams.maps[column])
            wrong = predicted != int(cams.target[column])
            text = f"{areas[column]:.2f}" + (f", says {class_names[predicted]}" if wrong else "")
            _write(axis, text, WRONG if wrong else RIGHT)
    layers = ", ".join(dict.fromkeys(cams.name for cams in models.values()))
    figure.suptitle(
        f"Class activation maps of the target class at {layers}",
        fontsize=11,
        y=1 - 0.12 / height,
        va="top",
    )
    what = "white line: half of the map's maximum; number: the fraction of the image within it"
    figure.text(0.5, 1 - 0.38 / height, what, fontsize=8, ha="center", va="top")
    _colour_bar(figure, width, height)
    return figure


def _summary(name: str, cams: Cams) -> str:
    numbers = cams.numbers()
    mean = numbers["area"]["mean"]
    area = "no positive map" if mean is None else f"mean area {mean:.3f}"
    lines = (line.replace("_ ", "_") for line in textwrap.wrap(name.replace("_", "_ "), LONGEST))
    return f"{chr(10).join(lines)}\n{area}\n{numbers['n_correct']} of {numbers['n_images']} right"


def _draw_map(axis: Any, image: Tensor, cam: Tensor) -> None:
    size = (image.shape[1], image.shape[2])
    grown = F.interpolate(cam[None, None].clamp(min=0), size, mode="bilinear")[0, 0].numpy()
    axis.imshow(picture(image).mean(2), cmap="gray", vmin=0, vmax=1)
    peak = grown.max()
    scaled = grown / peak if peak > 0 else grown
    axis.imshow(scaled, cmap="inferno", vmin=0, vmax=1, alpha=OPACITY)
    if peak > scaled.min() and scaled.min() < 0.5 < scaled.max():
        axis.contour(scaled, levels=[0.5], colors=HALF, linewidths=1.2)


def _write(axis: Any, text: str, colour: str) -> None:
    axis.text(
        0.5, -0.03, text, transform=axis.transAxes, fontsize=8, color=colour, ha="center", va="top"
    )


def _colour_bar(figure: Any, width: float, height: float) -> None:
    axis = figure.add_axes((LABEL / width, 0.3 / height, 1.5 / width, 0.1 / height))
    scale = import_module("matplotlib.cm").ScalarMappable(cmap="inferno")
    bar = figure.colorbar(scale, cax=axis, orientation="horizontal", ticks=[0, 0.5, 1])
    bar.ax.set_xticklabels(["0 or less", "half", "map's maximum"], fontsize=8)
