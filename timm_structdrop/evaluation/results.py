"""Results in timm's columns, printed and written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_structdrop.files import save_csv, save_text

__all__ = ["accuracy_row", "write_results"]


def accuracy_row(
    model: str,
    figures: Mapping[str, float],
    n_parameters: int,
    data: Mapping[str, Any],
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """timm's columns and the loss: accuracies and errors in percent, parameters in millions.

    `figures` come from `evaluate`, `data` from `timm.data.resolve_data_config`.
    """
    row = {
        "model": model,
        "top1": round(figures["top1"], 4),
        "top1_err": round(100 - figures["top1"], 4),
        "top5": round(figures["top5"], 4),
        "top5_err": round(100 - figures["top5"], 4),
        "loss": round(figures["loss"], 4),
        "param_count": round(n_parameters / 1e6, 2),
        "img_size": data["input_size"][-1],
        "crop_pct": data["crop_pct"],
        "interpolation": data["interpolation"],
    }
    return row if checkpoint is None else {**row, "checkpoint": str(checkpoint)}


def write_results(
    path: Path, results: Mapping[str, Any] | Sequence[Mapping[str, Any]], format: str = "csv"
) -> None:
    """Write one row or several to `path`, whole or not at all; `format` is "csv" or "json".

    In CSV a result that consists of `rows` is written as these. A column that some rows lack is
    empty there. Raises `UserError` when the file can't be written.
    """
    if format == "json":
        save_text(json.dumps(results, indent=4), path)
    else:
        results = [results] if isinstance(results, Mapping) else results
        save_csv([row for result in results for row in result.get("rows", [result])], path)
