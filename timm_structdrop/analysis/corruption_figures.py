"""Accuracy against the severity of corruptions, DropCluster's Figs. 9 and 10, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from timm_structdrop.analysis.figure import new_figure

__all__ = ["draw_corruption_curves"]

# Okabe and Ito's colours, which readers with any colour vision tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"
MEAN = "mean over corruptions"


def draw_corruption_curves(
    models: Mapping[str, Sequence[Mapping[str, Any]]], metric: str = "top1"
) -> Any:
    """One panel for each corruption and one for their mean, one curve for each model.

    The mean is over the corruptions and severities that all models have, so that it compares them.

    Severity 0 is the accuracy without corruption.

    Args:
        models: by name, the rows of ``validate.py --corruptions``; the panels are the corruptions
            of the first.
        metric: ``top1`` (Fig. 9) or ``top5`` (Fig. 10).

    Returns:
        A matplotlib figure.

    Raises:
        UserError: matplotlib is not installed.
    """
    curves = {name: _curves(rows, metric) for name, rows in models.items()}
    panels = list(next(iter(curves.values())))
    shared = [panel for panel in panels if all(panel in by_panel for by_panel in curves.values())]
    if len(shared) > 1:
        panels.append(MEAN)
        severities = set.intersection(*(set(by[p]) for by in curves.values() for p in shared))
        for by in curves.values():
            by[MEAN] = {s: fmean(by[panel][s] for panel in shared) for s in severities}
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = max(2.9 * columns + 0.6, 5.4), 2.25 * rows + 1.15
    figure = new_figure(width, height)
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for index, (axis, panel) in enumerate(zip(axes, panels, strict=False)):
        for number, (name, by_panel) in enumerate(curves.items()):
            if panel in by_panel:
                axis.plot(
                    *zip(*sorted(by_panel[panel].items()), strict=True),
                    color=COLOURS[number % len(COLOURS)],
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=4.5,
                    linewidth=1.6,
                    label=name,
                )
        axis.set_title(panel.replace("_", " "), fontsize=10)
        axis.set_xticks(range(6))
        axis.set_xlim(-0.25, 5.25)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if index % columns == 0:
            axis.set_ylabel("accuracy, %")
        if index + columns >= len(panels):
            axis.set_xlabel("severity (0: none)")
            axis.tick_params(labelbottom=True)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    every = [value for by in curves.values() for panel in by.values() for value in panel.values()]
    axes[0].set_ylim(0, 1.05 * max(1.0, *every))
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - 0.3 / height),
        ncols=min(len(curves), max(1, int(width / 3))),
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(
        f"{metric.capitalize().replace('Top', 'Top-')} accuracy under ImageNet-C's corruptions",
        fontsize=12,
        y=1 - 0.08 / height,
        va="top",
    )
    figure.subplots_adjust(
        left=0.7 / width,
        right=1 - 0.15 / width,
        bottom=0.5 / height,
        top=1 - 0.95 / height,
        hspace=0.52,
        wspace=0.12,
    )
    return figure


def _curves(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, dict[int, float]]:
    """By corruption, accuracy by severity."""
    by_name: dict[str, dict[int, float]] = {}
    clean = 0.0
    for row in rows:
        name, severity, value = str(row["corruption"]), int(row["severity"]), float(row[metric])
        if name == "none":
            clean = value
        else:
            by_name.setdefault(name, {})[severity] = value
    for values in by_name.values():
        values[0] = clean
    return by_name
