"""The figure that every picture is drawn on; matplotlib is imported when the first one is."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from timm_structdrop.errors import UserError

__all__ = ["new_figure"]


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches that no window and no global state knows of.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        figure = import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise UserError(
            'pictures need matplotlib: pip install "timm-structdrop[plot]"; it is not installed'
        ) from error
    return figure(figsize=(width, height), facecolor="white")
