"""Words for people: numbers with their nouns, and tables."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["counted", "table"]


def counted(number: int, noun: str) -> str:
    """``1 epoch``, ``2 epochs``; nouns in -ss, -x and -tch get -es."""
    ending = "" if number == 1 else "es" if noun.endswith(("ss", "x", "tch")) else "s"
    return f"{number:,} {noun}{ending}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart, below a header and a rule."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
