"""Files of a run that are never half-written: a new name first, then renamed over the old one."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from timm_structdrop.errors import UserError, one_line

__all__ = ["SummaryFile", "read_summary", "replace_with_link", "save_whole", "write_whole"]


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it to ``path``.

    Raises:
        UserError: the disk is full, the folder not writable, ...; what was at ``path`` is intact.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        cause = _system_error(error)
        if cause is None:
            raise
        kept = f"; {path.name} of before is intact" if path.exists() else ""
        raise UserError(f"{path} cannot be written: {one_line(cause)}{kept}") from error


def _system_error(error: BaseException) -> OSError | None:
    """The error of the operating system behind what ``torch.save`` makes of it."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen


def save_whole(state: Mapping[str, Any], path: Path) -> None:
    """``torch.save`` through `write_whole`."""
    write_whole(path, lambda file: torch.save(dict(state), file))


def replace_with_link(source: Path, path: Path) -> None:
    """Make ``path`` another name of ``source``'s content, in one step; a copy without hard links.

    Raises:
        UserError: a copy was needed and cannot be written; what was at ``path`` is intact.
    """
    if path.exists() and path.samefile(source):
        return  # renaming one link over another of the same file would leave both
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {one_line(error)}") from error


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
            self._write()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row and write the file; a column that earlier rows lack is empty there."""
        self.rows.append(dict(row))
        self._write()

    def _write(self) -> None:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        if self.rows:
            writer.writeheader()
            writer.writerows(self.rows)
        write_whole(self.path, lambda file: file.write(text.getvalue().encode()))
