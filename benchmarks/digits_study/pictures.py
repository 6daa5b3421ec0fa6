"""The pictures of the study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.digits_study.cells import MAIN
from benchmarks.digits_study.runs import FRACTIONS, TUNED_AT
from benchmarks.digits_study.statistics import Difference
from timm_structdrop.analysis.figure import new_figure
from timm_structdrop.evaluation import PAPER_CORRUPTIONS
from timm_structdrop.files import save_png

SHOWN = ("clean", "noise", "corrupted")


def draw_differences(
    differences: Mapping[tuple[str, float, str], tuple[Difference, float]], path: Path
) -> None:
    """Each regularizer minus none, with 95 % intervals; filled where adjusted p < 0.05."""
    cells = list(dict.fromkeys(cell for cell, _, _ in differences))
    figure = new_figure(11, 1.2 + 0.9 * len(cells))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(FRACTIONS), len(SHOWN), sharey=True, sharex="col")
    for row, fraction in zip(axes, FRACTIONS, strict=True):
        for axis, name in zip(row, SHOWN, strict=True):
            axis.axvline(0.0, color="0.6", linewidth=1)
            for height, cell in enumerate(reversed(cells)):
                found, p = differences[cell, fraction, name]
                axis.plot([found.low, found.high], [height, height], color="C0", linewidth=1.5)
                face = "C0" if p < 0.05 else "white"
                axis.plot(found.mean, height, "o", color="C0", markerfacecolor=face, markersize=6)
            axis.set_yticks(range(len(cells)), list(reversed(cells)))
            if fraction == FRACTIONS[0]:
                axis.set_title(name)
        row[0].set_ylabel(f"{1000 * fraction:.0f} images", fontsize="large")
    for axis in axes[-1]:
        axis.set_xlabel("points of accuracy above none")
    figure.suptitle("Paired differences over seeds (filled: adjusted p < 0.05)")
    save_png(figure, path)


def draw_corruptions(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Mean accuracy of each regularizer under each corruption, at the fraction of the tuning."""
    figure = new_figure(10, 5)
    figure.set_layout_engine("constrained")
    axis = figure.subplots()
    cells = [cell.name for cell in MAIN]
    width = 0.8 / len(cells)
    for number, cell in enumerate(cells):
        chosen = [r for r in rows if r["cell"] == cell and float(r["fraction"]) == TUNED_AT]
        means = [
            statistics.fmean(float(row[f"{name}_top1"]) for row in chosen)
            for name in PAPER_CORRUPTIONS
        ]
        places = [index + (number - len(cells) / 2 + 0.5) * width for index in range(len(means))]
        axis.bar(places, means, width, label=cell, color=f"C{number}")
    names = [name.replace("_", "\n") for name in PAPER_CORRUPTIONS]
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("accuracy, mean of severities 1-5 (%)")
    axis.set_title(f"{1000 * TUNED_AT:.0f} training images")
    figure.legend(ncols=5, loc="outside lower center")
    save_png(figure, path)
