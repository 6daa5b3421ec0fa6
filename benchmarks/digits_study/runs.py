"""The runs of the study: which are missing, doing them in processes, the file of results."""

from __future__ import annotations

import csv
import multiprocessing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.digits_study.cells import ABLATIONS, CONTROLS, MAIN, RATES, by_name
from benchmarks.digits_study.protocol import FIGURES, run

RESULTS = Path(__file__).parent.parent / "results"
FILE = RESULTS / "digits-study.csv"
COLUMNS = ("stage", "cell", "fraction", "seed", "rate", *FIGURES)

FRACTIONS = (0.2, 0.1, 0.05)
TUNED_AT = 0.1
SEEDS = range(10)
TUNING_SEEDS = range(100, 103)


class Run(NamedTuple):
    """What is to be run: a row's key."""

    stage: str
    cell: str
    fraction: float
    seed: int
    rate: float


def read() -> list[dict[str, str]]:
    """The rows that are there."""
    if not FILE.exists():
        return []
    with FILE.open(newline="") as file:
        return list(csv.DictReader(file))


def of(row: dict[str, str]) -> Run:
    return Run(
        row["stage"], row["cell"], float(row["fraction"]), int(row["seed"]), float(row["rate"])
    )


def tuned_rates(rows: Iterable[dict[str, str]]) -> dict[str, float]:
    """The rate of each tuned cell with the best mean accuracy on validation images.

    Raises:
        SystemExit: there are none yet.
    """
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if row["stage"] == "tune":
            key = (row["cell"], float(row["rate"]))
            found.setdefault(key, []).append(float(row["val_top1"]))
    best: dict[str, tuple[float, float]] = {}
    for (cell, rate), values in sorted(found.items()):
        candidate = (sum(values) / len(values), rate)
        best[cell] = max(best.get(cell, (0.0, 0.0)), candidate, key=lambda pair: pair[0])
    if set(best) != set(RATES):
        raise SystemExit("rates are chosen by the tuning runs: run `tune` first")
    return {cell: rate for cell, (_, rate) in best.items()}


def planned(stage: str, rows: list[dict[str, str]]) -> list[Run]:
    """All runs of a stage, one seed after the other."""
    if stage == "tune":
        return [
            Run(stage, cell, TUNED_AT, seed, rate)
            for seed in TUNING_SEEDS
            for cell, rates in RATES.items()
            for rate in rates
        ]
    rates = tuned_rates(rows)
    cells = (*MAIN, *CONTROLS) if stage == "main" else ABLATIONS
    return [
        Run(
            stage,
            cell.name,
            fraction,
            seed,
            rates[cell.tuned_as or cell.name] if cell.rate is None else cell.rate,
        )
        for seed in SEEDS
        for fraction in (FRACTIONS if stage == "main" else (TUNED_AT,))
        for cell in cells
    ]


def do(todo: list[Run], jobs: int) -> Iterator[dict[str, Any]]:
    """The rows of the runs, in the order in which they end."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.imap_unordered(row, todo)


def row(key: Run) -> dict[str, Any]:
    found = run(by_name(key.cell), key.rate, key.fraction, key.seed, test=key.stage != "tune")
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
    return {**key._asdict(), **rounded}


def append(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Write each row when it comes; what was cut off is done again by the next call."""
    RESULTS.mkdir(exist_ok=True)
    starts = not FILE.exists()
    with FILE.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if starts:
            writer.writeheader()
        for found in rows:
            writer.writerow(found)
            file.flush()
            yield found
