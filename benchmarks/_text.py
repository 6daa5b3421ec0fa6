"""Figures in words, and tables that read well in a terminal and in Markdown."""

from collections.abc import Sequence
from typing import Any

__all__ = ["milliseconds", "percent", "ratio", "table", "versions"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, its columns aligned."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    padded = [[text.ljust(width) for text, width in zip(r, widths, strict=True)] for r in cells]
    padded.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(row) + " |" for row in padded]


def ratio(found: dict[str, Any], places: int = 2) -> str:
    """``1.56 (1.45 to 1.60)``: median and quartiles."""
    low, high = (f"{found[name]:.{places}f}" for name in ("low", "high"))
    return f"{found['median']:.{places}f} ({low} to {high})"


def milliseconds(found: dict[str, Any]) -> str:
    """The median time, in a unit that suits it."""
    value = found["median"]
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def percent(share: float) -> str:
    """A share of 1 as ``0.23 %``, with two digits that matter."""
    value = 100 * share
    return "below 0.0001 %" if 0 <= value < 1e-4 else f"{value:.2g} %"


def versions(results: dict[str, Any]) -> str:
    """``torch 2.6.0, timm 1.0.31``: what a recorded measurement ran with."""
    return ", ".join(f"{name} {version}" for name, version in results["versions"].items())
