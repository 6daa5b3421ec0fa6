"""What a sweep found: each run's figures, mean and spread of each cell, beside the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_structdrop.analysis.figure import new_figure
from timm_structdrop.cli._sweep_runs import done_runs
from timm_structdrop.files import save_csv, save_text
from timm_structdrop.recipes import Cell, Table
from timm_structdrop.training import read_summary

__all__ = ["CellResult", "collect", "draw_results", "markdown", "write_numbers"]

OURS, PAPER = "#0b6e4f", "#b2182b"
LEGEND = ("seed", "mean", "mean ± std", "paper")
WORDS = {
    "top1": "top-1 accuracy (%)",
    "top5": "top-5 accuracy (%)",
    "error": "top-1 error (%)",
    "error5": "top-5 error (%)",
}


@dataclass(frozen=True)
class CellResult:
    """A cell of a table, measured.

    Attributes:
        cell: what it is, with the paper's figures.
        values: by figure, that of each seed, in percent.
    """

    cell: Cell
    values: Mapping[str, Mapping[int, float]]

    def mean(self, figure: str) -> float | None:
        """Over the seeds; None without any."""
        values = list(self.values.get(figure, {}).values())
        return statistics.mean(values) if values else None

    def std(self, figure: str) -> float | None:
        """Of the seeds, with n - 1; None for fewer than two."""
        values = list(self.values.get(figure, {}).values())
        return statistics.stdev(values) if len(values) > 1 else None


def collect(table: Table, folder: Path, cells: Collection[str] = ()) -> list[CellResult]:
    """The figures of every run in a sweep's folder that is done, by the table's rule.

    Args:
        table: what the sweep is of.
        folder: of the sweep.
        cells: cells to name even if none of their runs is done.
    """
    results = []
    for key, cell in table.cells.items():
        runs = done_runs(folder / key)
        if not runs and key not in cells:
            continue
        rows = {seed: read_summary(place / "summary.csv") for seed, place in runs.items()}
        values: dict[str, dict[int, float]] = {}
        for figure in table.figures():
            found = {seed: table.metric.of(of_run, figure) for seed, of_run in rows.items()}
            values[figure] = {seed: value for seed, value in found.items() if value is not None}
        results.append(CellResult(cell, values))
    return results


def write_numbers(table: Table, results: Sequence[CellResult], folder: Path) -> list[Path]:
    """``runs.csv`` (a row a run), ``table.csv`` (a row a cell and figure) and ``table.md``."""
    per_run = []
    for result in results:
        seeds = sorted({seed for values in result.values.values() for seed in values})
        for seed in seeds:
            figures = {name: _text(values.get(seed), 4) for name, values in result.values.items()}
            per_run.append({"recipe": result.cell.name, "seed": seed, **figures})
    paths = [save_csv(per_run, folder / "runs.csv")] if per_run else []
    paths.append(save_csv(_cell_rows(table, results), folder / "table.csv"))
    return [*paths, save_text(markdown(table, results), folder / "table.md")]


def _cell_rows(table: Table, results: Sequence[CellResult]) -> list[dict[str, Any]]:
    rows = []
    for result in results:
        for figure in table.figures():
            mean, paper = result.mean(figure), result.cell.published.get(figure)
            difference = None if mean is None or paper is None else mean - paper
            rows.append(
                {
                    "recipe": result.cell.name,
                    "row": result.cell.row,
                    "figure": figure,
                    "n": len(result.values[figure]),
                    "mean": _text(mean, 4),
                    "std": _text(result.std(figure), 4),
                    "published": _text(paper),
                    "published_std": _text(result.cell.published_std.get(figure)),
                    "difference": _text(difference, 4),
                }
            )
    return rows


def markdown(table: Table, results: Sequence[CellResult]) -> str:
    """The table for people: mean ± standard deviation of the seeds, n, and the paper's figure."""
    figures = table.figures()
    with_paper = [f for f in figures if any(f in result.cell.published for result in results)]
    header = ["", "n"]
    for figure in figures:
        header += [figure, *([f"{figure}, paper"] if figure in with_paper else [])]
    lines = [_line(header), _line(["---"] + ["---:"] * (len(header) - 1))]
    for result in results:
        row = [result.cell.row, str(max(len(values) for values in result.values.values()))]
        for figure in figures:
            row.append(_spread(result.mean(figure), result.std(figure)))
            if figure in with_paper:
                paper, std = result.cell.published, result.cell.published_std
                row.append(_spread(paper.get(figure), std.get(figure)))
        lines.append(_line(row))
    over = f", over {table.runs} runs in the paper" if table.runs else ""
    rule = (
        f"Accuracies and errors in percent, mean ± standard deviation (n - 1) of n seeds. "
        f"Figure of a run: {table.metric.words()}{over}."
    )
    notes = [f"- {cell.row}: {cell.note}" for cell in (r.cell for r in results) if cell.note]
    parts = [f"# {title(table)}", "\n".join(lines), rule, table.note, "\n".join(notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def title(table: Table) -> str:
    """``Table 1 of Chen et al. 2020: CIFAR-100, ...``."""
    source = f"{table.table} of {table.paper.split(',')[0]}: " if table.paper else ""
    return f"{source}{table.about or table.name}"


def draw_results(table: Table, results: Sequence[CellResult]) -> Any:
    """The first figure of the table, a line a cell: each seed, their mean ± standard deviation, and
    the paper's figure.

    Returns:
        A matplotlib figure.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure_name = table.figures()[0]
    width, height = 8.0, 1.5 + 0.34 * len(results)
    figure = new_figure(width, height)
    axis = figure.add_subplot()
    for y, result in enumerate(results):
        _draw_cell(axis, y, result, figure_name)
    axis.set_yticks(range(len(results)), [result.cell.row for result in results], fontsize=9)
    axis.set_ylim(len(results) - 0.4, -0.6)
    axis.margins(x=0.08)
    left, right = axis.get_xlim()
    axis.set_xlim(max(left, 0), min(right, 100))  # percent
    axis.grid(axis="x", color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.set_xlabel(f"{WORDS.get(figure_name, f'{figure_name} (%)')}, {table.metric.words()}")
    figure.text(0.5, 1 - 0.1 / height, title(table), fontsize=11, ha="center", va="top")
    handles, labels = axis.get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    marks = {label: found[label] for label in LEGEND if label in found}
    figure.legend(
        marks.values(), marks.keys(), loc="lower center", ncols=3, frameon=False, fontsize=9
    )
    figure.tight_layout(rect=(0, 0.3 / height, 1, 1 - 0.3 / height))
    return figure


def _draw_cell(axis: Any, y: int, result: CellResult, figure: str) -> None:
    values = list(result.values[figure].values())
    mean, std = result.mean(figure), result.std(figure)
    if mean is not None:
        axis.plot(values, [y] * len(values), "o", color=OURS, alpha=0.3, markersize=5, label="seed")
        label = "mean ± std" if std is not None else "mean"
        axis.errorbar(mean, y, xerr=std, fmt="o", color=OURS, markersize=6, capsize=3, label=label)
    paper = result.cell.published.get(figure)
    if paper is not None:
        axis.plot(
            [paper], [y], "D", markerfacecolor="none", color=PAPER, markersize=7, label="paper"
        )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _spread(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def _text(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
