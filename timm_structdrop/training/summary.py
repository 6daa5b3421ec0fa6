"""``summary.csv``: a row for each epoch of a run."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_structdrop.errors import UserError
from timm_structdrop.files import save_csv

__all__ = ["SummaryFile", "read_summary"]


def read_summary(path: Path) -> list[dict[str, str]]:
    """The rows of a run's ``summary.csv``; none where there is no such file yet.

    Raises:
        UserError: it is no table with an epoch in each row.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except (csv.Error, UnicodeDecodeError):
        rows = [{}]
    if not all(str(row.get("epoch")).isdigit() for row in rows):
        raise UserError(f"summary.csv must have one epoch per row; got {path}")
    return rows


class SummaryFile:
    """``summary.csv`` of a run: one header, one row for each epoch.

    Args:
        path: the file; rows that a run being continued left there are kept.
        first_epoch: rows at or after it belong to epochs that are trained again, and are dropped.

    Raises:
        UserError: the file at ``path`` is not such a summary, or cannot be written.
    """

    def __init__(self, path: Path, first_epoch: int = 0) -> None:
        self.path = path
        self.rows: list[Mapping[str, Any]] = [
            row for row in read_summary(path) if int(row["epoch"]) < first_epoch
        ]
        if path.exists():
            save_csv(self.rows, path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row and write the file; a column that earlier rows lack is empty there."""
        self.rows.append(dict(row))
        save_csv(self.rows, self.path)
