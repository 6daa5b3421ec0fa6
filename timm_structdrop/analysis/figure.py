"""What all pictures share; matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
from torch import Tensor

from timm_structdrop.errors import UserError

__all__ = ["colour_bar", "new_figure", "picture", "scaled"]


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


def picture(image: Tensor) -> Any:
    """A model's input as a picture: colours where it has three channels, else their mean."""
    pixels = image.double().permute(1, 2, 0).numpy()
    return scaled(pixels if pixels.shape[2] == 3 else pixels.mean(2, keepdims=True).repeat(3, 2))


def scaled(values: Any) -> Any:
    """From the lowest value at 0 to the highest at 1; zeros where all are the same."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def colour_bar(figure: Any, axis: Any, colours: str, ticks: Mapping[float, str]) -> None:
    """Fill a small axis with the bar of a colour map from 0 to 1, with words at some values."""
    scale = import_module("matplotlib.cm").ScalarMappable(cmap=colours)
    bar = figure.colorbar(scale, cax=axis, orientation="horizontal", ticks=list(ticks))
    bar.ax.set_xticklabels(list(ticks.values()), fontsize=8)
