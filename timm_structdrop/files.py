"""Files that are never half-written: a new name first, then renamed over the old one."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from timm_structdrop.errors import UserError, one_line

__all__ = [
    "Files",
    "output_folder",
    "replace_with_link",
    "save_csv",
    "save_json",
    "save_png",
    "save_text",
    "write_whole",
]

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


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then rename it to ``path``.

    Returns:
        ``path``.

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
    return path


def _system_error(error: BaseException) -> OSError | None:
    """The error of the operating system behind what ``torch.save`` makes of it."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen


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


def save_text(text: str, path: Path) -> Path:
    """Write text as UTF-8; as :func:`write_whole`."""
    return write_whole(path, lambda file: file.write(text.encode()))


def save_json(numbers: Mapping[str, Any], path: Path) -> Path:
    """Write numbers as JSON; as :func:`write_whole`."""
    return save_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n", path)


def save_csv(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Write rows as CSV with a header, nothing without rows; as :func:`write_whole`.

    A column that some rows lack is empty there.
    """
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if rows:
        writer.writeheader()
        writer.writerows(rows)
    return save_text(text.getvalue(), path)


def save_png(figure: Any, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a matplotlib figure, with ``metadata`` in the PNG's text; as :func:`write_whole`."""
    return write_whole(
        path, lambda file: figure.savefig(file, format="png", dpi=PNG_DPI, metadata=metadata)
    )


class Files:
    """What a command leaves behind in a folder: numbers at once, pictures at the end.

    Attributes:
        paths: what is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []
        self.pictures: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = []

    def json(self, name: str, numbers: Mapping[str, Any]) -> None:
        """Write ``numbers`` into the file ``name``."""
        self.paths.append(save_json(numbers, self.folder / name))

    def csv(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write ``rows`` into the file ``name``, a column for each key."""
        self.paths.append(save_csv(rows, self.folder / name))

    def picture(self, name: str, draw: Callable[..., Any], *numbers: Any) -> None:
        """Keep a picture for later: ``draw(*numbers)`` returns its figure."""
        self.pictures.append((name, draw, numbers))

    def draw(self) -> None:
        """Write the pictures; the error without matplotlib says that the numbers are there."""
        for name, draw, numbers in self.pictures:
            try:
                figure = draw(*numbers)
            except UserError as error:
                raise UserError(f"{error}; the numbers are in {self.folder}") from error
            self.paths.append(save_png(figure, self.folder / name))
