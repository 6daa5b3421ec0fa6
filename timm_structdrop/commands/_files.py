"""What a command leaves behind: numbers at once, pictures at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from timm_structdrop.analysis import save_csv, save_json, save_png
from timm_structdrop.errors import UserError

__all__ = ["Files"]


class Files:
    """Writes numbers into a folder, keeps pictures for later, and remembers what is written."""

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
