"""Accuracy under corruption: the rows of a study and ImageNet-C's errors, from the rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from timm_structdrop.errors import UserError, one_line

__all__ = ["check_baseline", "corruption_errors", "corruption_table", "read_corruption_rows"]

Row = Mapping[str, Any]


def corruption_errors(rows: Sequence[Row], baseline: Sequence[Row] = ()) -> dict[str, Any]:
    """Errors over corruptions c and severities s from top-1 errors E_(s,c), in percent.

    ``mean_corruption_error`` = mean_c mean_s E_(s,c), and ``corruption_error`` is mean_s E_(s,c) by
    corruption. With the rows of a baseline b (AlexNet for ImageNet-C) also the errors of Hendrycks
    & Dietterich 2019 over these c and s, 100 being the baseline's:

    ``mce`` = 100 mean_c (sum_s E_(s,c) / sum_s E^b_(s,c)), and with the errors E without corruption
    ``relative_mce`` = 100 mean_c (sum_s (E_(s,c) - E) / sum_s (E^b_(s,c) - E^b)), which is None
    where a corruption does not raise the baseline's error.

    Args:
        rows: mappings with ``corruption``, ``severity`` and ``top1_err``, one of them of the
            corruption ``none``.
        baseline: the same, with at least the corruptions and severities of ``rows``.

    Raises:
        UserError: the baseline lacks a row, or makes no error under a corruption.
    """
    errors = _errors(rows)
    names = list(dict.fromkeys(name for name, _ in errors if name != "none"))
    severities = sorted({severity for name, severity in errors if name != "none"})
    by_name = {name: fmean(errors[name, s] for s in severities) for name in names}
    found: dict[str, Any] = {
        "mean_corruption_error": round(fmean(by_name.values()), 4),
        "corruption_error": {name: round(error, 4) for name, error in by_name.items()},
    }
    if not baseline:
        return found
    other = _errors(baseline)
    check_baseline(baseline, errors)
    other_by_name = {name: fmean(other[name, s] for s in severities) for name in names}
    for name, error in other_by_name.items():
        if error <= 0:
            raise UserError(f"the baseline must make an error under {name}; its error is {error}")
    clean, other_clean = errors["none", 0], other["none", 0]
    rises = [(by_name[n] - clean, other_by_name[n] - other_clean) for n in names]
    found["mce"] = round(100 * fmean(by_name[n] / other_by_name[n] for n in names), 4)
    found["relative_mce"] = None
    if all(rise > 0 for _, rise in rises):
        found["relative_mce"] = round(100 * fmean(own / rise for own, rise in rises), 4)
    return found


def check_baseline(baseline: Sequence[Row], wanted: Iterable[tuple[str, int]]) -> None:
    """Raise UserError unless the baseline has a row for each wanted (corruption, severity)."""
    have = _errors(baseline)
    for name, severity in wanted:
        if (name, severity) not in have:
            raise UserError(
                "the baseline must have the corruptions and severities of this evaluation; "
                f"it has no {name} at severity {severity}"
            )


def _errors(rows: Sequence[Row]) -> dict[tuple[str, int], float]:
    return {(str(r["corruption"]), int(r["severity"])): float(r["top1_err"]) for r in rows}


def read_corruption_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a results file of ``validate.py --corruptions``, CSV or JSON, of one model.

    Raises:
        UserError: the file is not there, or is no such file, or is of several models.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the results of a baseline must be an existing file; got {path}")
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith(("{", "[")):
            found = json.loads(text)
            rows = found["rows"] if isinstance(found, dict) else []
        else:
            rows = list(csv.DictReader(text.splitlines()))
        errors = _errors(rows)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(
            f"the results of a baseline must be those of --corruptions; {path} has other "
            f"contents ({type(error).__name__}: {one_line(error)})"
        ) from error
    if len(errors) != len(rows) or ("none", 0) not in errors:
        raise UserError(
            "the results of a baseline must be one model's, with a row without corruption; "
            f"got {len(rows)} rows in {path}"
        )
    return rows


def corruption_table(rows: Sequence[Row]) -> str:
    """Top-1 accuracy in percent: a line for each corruption, a column for each severity, the mean.

    The last line is the mean over the corruptions; the first says what is right without any.
    """
    top1 = {(str(r["corruption"]), int(r["severity"])): float(r["top1"]) for r in rows}
    severities = sorted({severity for _, severity in top1 if severity})
    names = list(dict.fromkeys(name for name, _ in top1 if name != "none"))
    cells = [[top1[name, severity] for severity in severities] for name in names]
    cells.append([fmean(column) for column in zip(*cells, strict=True)])
    width = max(len(name) for name in (*names, "without corruption"))
    lines = [f"{'top-1 %':{width}}" + "".join(f"  sev. {s}" for s in severities) + "    mean"]
    lines.append(f"{'without corruption':{width}}{top1['none', 0]:8.2f}")
    for name, values in zip((*names, "mean"), cells, strict=True):
        numbers = "".join(f"{value:8.2f}" for value in (*values, fmean(values)))
        lines.append(f"{name:{width}}{numbers}")
    return "\n".join(lines)
