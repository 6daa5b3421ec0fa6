"""Accuracy over learning rate and gamma, CamDrop's Fig. 4, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from timm_structdrop.analysis.figure import new_figure

__all__ = ["draw_accuracy_surface"]


def draw_accuracy_surface(top1: Mapping[tuple[float, float], float], title: str) -> Any:
    """Fig. 4 of CamDrop: a surface over the learning rate, in equal steps, and gamma; beside it
    the same figures as a table of colours.

    Args:
        top1: percent by (learning rate, gamma), all pairs of at least two of each; gamma = 1 is
            training without CamDrop.
        title: of the picture.

    Returns:
        A matplotlib figure.
    """
    rates = sorted({rate for rate, _ in top1})
    gammas = sorted({gamma for _, gamma in top1}, reverse=True)
    grid = np.array([[top1[rate, gamma] for rate in rates] for gamma in gammas])
    import_module("mpl_toolkits.mplot3d")  # registers the projection
    figure = new_figure(12.4, 5.2)
    figure.suptitle(title, fontsize=11)
    surface = figure.add_axes((0.0, 0.05, 0.46, 0.86), projection="3d", computed_zorder=False)
    _draw_surface(surface, rates, gammas, grid)
    _draw_table(figure.add_axes((0.54, 0.13, 0.44, 0.74)), rates, gammas, grid)
    return figure


def _draw_surface(axis: Any, rates: Sequence[float], gammas: Sequence[float], grid: Any) -> None:
    x, y = np.meshgrid(np.arange(len(rates)), np.asarray(gammas))
    axis.plot_surface(
        x, y, grid, cmap="viridis", vmin=0, vmax=100, edgecolor="black", linewidth=0.4, alpha=0.9,
        rstride=1, cstride=1,
    )  # fmt: skip
    axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates], fontsize=8)
    axis.set_yticks(gammas, [f"{gamma:g}" for gamma in gammas], fontsize=8)
    axis.set_zlim(0, 100)
    axis.tick_params(axis="z", labelsize=8)
    axis.set_xlabel("learning rate", labelpad=8)
    axis.set_ylabel("gamma", labelpad=6)
    axis.set_zlabel("top-1 (%)")
    axis.view_init(elev=28, azim=-58)
    axis.set_box_aspect(None, zoom=0.88)


def _draw_table(axis: Any, rates: Sequence[float], gammas: Sequence[float], grid: Any) -> None:
    axis.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    labels = [f"{gamma:g}" + (" (none)" if gamma == 1 else "") for gamma in gammas]
    axis.set_yticks(range(len(gammas)), labels)
    axis.set_xlabel("learning rate")
    axis.set_ylabel("gamma")
    axis.set_title("top-1 (%)", fontsize=10)
    for (row, column), value in np.ndenumerate(grid):
        colour = "black" if value > 55 else "white"
        axis.text(column, row, f"{value:.1f}", color=colour, ha="center", va="center", fontsize=9)
