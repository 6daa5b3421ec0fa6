"""The studies of validate.py on a subject: accuracy, corruptions, an attack, dropping.

Each returns a mapping with at least ``model`` and ``top1``; where a study has several measurements
they are its ``rows``, flat mappings with the same columns, which is what a CSV file gets.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from timm.utils import random_seed

from timm_structdrop.analysis import draw_corruption_curves
from timm_structdrop.evaluation import (
    SEVERITIES,
    CorruptedDataset,
    corruption_errors,
    corruption_table,
    dropping,
    evaluate,
    evaluate_attack,
    read_corruption_rows,
)
from timm_structdrop.files import save_png
from timm_structdrop.recipes.build_evaluation import Subject
from timm_structdrop.recipes.robustness_flags import attack_settings
from timm_structdrop.training import Progress

__all__ = ["study"]

_logger = logging.getLogger(__name__)


def study(subject: Subject) -> dict[str, Any]:
    """The evaluation that the subject's flags ask for.

    Raises:
        UserError: the data, the model or a baseline does not fit it.
    """
    flags = subject.flags
    if flags.corruptions:
        return _corruptions(subject)
    if flags.attack:
        return _attack(subject)
    if flags.drop_at_inference:
        return _drop_at_inference(subject)
    return _accuracy(subject)


class _Overall(Progress):
    """One progress over several passes, which do not end it."""

    def close(self, note: str = "") -> None:
        return

    def end(self) -> None:
        super().close()


def _overall(subject: Subject, passes: int) -> _Overall:
    return _Overall("Validate", passes * len(subject.loader), subject.flags.log_freq)


def _accuracy(subject: Subject) -> dict[str, Any]:
    progress = Progress("Validate", len(subject.loader), subject.flags.log_freq)
    figures = evaluate(subject.model, subject.loader, progress=progress, **subject.how())
    row = subject.row(figures)
    _logger.info(
        " * Acc@1 {top1:.3f} ({top1_err:.3f}) Acc@5 {top5:.3f} ({top5_err:.3f}) "
        "Loss {loss:.4f}".format(**row)
    )
    return row


def _corruptions(subject: Subject) -> dict[str, Any]:
    """Rows, without any corruption first, and the errors over them."""
    flags = subject.flags
    dataset: CorruptedDataset = subject.loader.dataset
    pairs = [(name, s) for name in flags.corruptions for s in flags.severities or SEVERITIES]
    progress = _overall(subject, 1 + len(pairs))

    def measure(name: str, severity: int) -> dict[str, Any]:
        dataset.choose(None if name == "none" else name, severity)
        progress.title = f"{name} {severity}" if severity else "No corruption"
        return _row(
            subject, {"corruption": name, "severity": severity}, _figures(subject, progress)
        )

    rows = [measure(name, severity) for name, severity in [("none", 0), *pairs]]
    progress.end()
    baseline = read_corruption_rows(flags.baseline_results) if flags.baseline_results else []
    errors = corruption_errors(rows, baseline)
    result = {**_head(subject, rows[0]), **errors, "rows": rows}
    if baseline:
        result["baseline"] = str(flags.baseline_results)
    _logger.info(corruption_table(rows))
    _logger.info(_errors_line(errors))
    if flags.plot:
        curves = {flags.model: rows}
        if baseline:
            curves[_other_name(flags.model, baseline[0])] = baseline
        path = Path(flags.plot)
        for metric, name in (("top1", path.name), ("top5", f"{path.stem}-top5{path.suffix}")):
            save_png(draw_corruption_curves(curves, metric), path.with_name(name))
            _logger.info(f"Curves of {metric} are in {path.with_name(name)}")
    return result


def _other_name(model: str, row: Mapping[str, Any]) -> str:
    name = str(row.get("model", "baseline"))
    return name if name != model else f"{name} (baseline)"


def _errors_line(errors: Mapping[str, Any]) -> str:
    line = f" * mean corruption error {errors['mean_corruption_error']:.2f} %"
    if "mce" in errors:
        relative = errors["relative_mce"]
        line += f", mCE {errors['mce']:.1f} of the baseline's 100"
        line += f", relative mCE {relative:.1f}" if relative is not None else ""
    return line


def _attack(subject: Subject) -> dict[str, Any]:
    flags = subject.flags
    attack = attack_settings(flags)
    figures = evaluate_attack(
        subject.model,
        subject.loader,
        attack,
        mean=_per_channel(subject, "mean"),
        std=_per_channel(subject, "std"),
        progress=Progress("Attack", len(subject.loader), flags.log_freq),
        **subject.how(),
    )
    success = figures["success_rate"]
    result = {
        "model": flags.model,
        "top1": round(100 - figures["clean_err"], 4),
        "top1_err": round(figures["clean_err"], 4),
        "attack": flags.attack,
        "error_rate": round(figures["error_rate"], 4),
        "success_rate": None if success is None else round(success, 4),
        "max_change": round(figures["max_change"], 6),
        **asdict(attack),
        **_facts(subject, figures),
    }
    _logger.info(
        f" * Error rate {result['error_rate']:.2f} % under the attack, {result['top1_err']:.2f} % "
        f"without; success rate {'-' if success is None else f'{success:.2f} %'}"
    )
    return result


def _per_channel(subject: Subject, name: str) -> tuple[float, ...]:
    """Mean or deviation for each channel, adapted where the loader adapts it: by averaging."""
    values, channels = tuple(subject.data[name]), subject.data["input_size"][0]
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def _drop_at_inference(subject: Subject) -> dict[str, Any]:
    """Rows, without dropping first."""
    flags = subject.flags
    progress = _overall(subject, 1 + len(flags.drop_at_inference))
    progress.title = "No dropping"
    off = {"block_size": "", "keep_prob": 1.0, "gamma": ""}
    rows = [_row(subject, off, _figures(subject, progress))]
    for drop in flags.drop_at_inference:
        progress.title = f"Block {drop.block_size}, keep {drop.keep_prob:g}, {drop.gamma}"
        random_seed(flags.seed)
        with dropping(subject.model, drop) as layers:
            rows.append(_row(subject, asdict(drop), _figures(subject, progress, active=layers)))
    progress.end()
    for row in rows:
        row["dropping"] = subject.note
        block = f"block {row['block_size']:>3}" if row["block_size"] else "no dropping"
        setting = f"keep {row['keep_prob']:<5g} {row['gamma']:5}"
        _logger.info(f" * {block:11} {setting} Acc@1 {row['top1']:.3f}")
    return {**_head(subject, rows[0]), "dropping": subject.note, "rows": rows}


def _figures(subject: Subject, progress: Progress, **more: Any) -> dict[str, float]:
    return evaluate(subject.model, subject.loader, progress=progress, **subject.how(), **more)


def _row(
    subject: Subject, setting: Mapping[str, Any], figures: Mapping[str, float]
) -> dict[str, Any]:
    row = subject.row(figures)
    return {"model": row.pop("model"), **setting, **row, **_facts(subject, figures)}


def _head(subject: Subject, clean: Mapping[str, Any]) -> dict[str, Any]:
    head = {name: clean[name] for name in ("model", "top1", "top1_err")}
    return {**head, **_facts(subject, clean)}


def _facts(subject: Subject, figures: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers are of."""
    flags = subject.flags
    return {
        "samples": figures["samples"],
        "seed": flags.seed,
        "dataset": flags.dataset or flags.data_dir or flags.data or "",
        "img_size": subject.data["input_size"][-1],
        "checkpoint": str(subject.checkpoint or ""),
    }
