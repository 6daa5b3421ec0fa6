"""Numbers and pictures on disk: JSON, CSV and PNG, each written whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from timm_structdrop.errors import UserError
from timm_structdrop.training import write_whole

__all__ = ["output_folder", "save_csv", "save_json", "save_png"]

PNG_DPI = 130


def output_folder(path: str | Path) -> Path:
    """Make the folder ``path``, with its parents, unless it is there.

    Raises:
        UserError: it, or one of its parents, is a file or not writable.
    """
    folder = Path(path)
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise UserError(f"the output must be a folder; {part} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"the output must be a writable folder; got {folder}")
    return folder


def save_json(numbers: Mapping[str, Any], path: Path) -> Path:
    """Write numbers as JSON; returns ``path``. UserError where it cannot be written."""
    text = json.dumps(numbers, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
    return path


def save_csv(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Write rows, all with the same keys, as CSV with a header; as :func:`save_json`."""
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode()))
    return path


def save_png(figure: Any, path: Path) -> Path:
    """Write a matplotlib figure; as :func:`save_json`."""
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=PNG_DPI))
    return path
