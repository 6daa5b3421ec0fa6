"""Run a table of a paper, every cell with several seeds, and set the results beside the paper's.

    python -m timm_structdrop sweep digits-regularizers --seeds 3 --jobs 2
    python -m timm_structdrop sweep rblock-table2 --data-dir tiny-imagenet-200.zip -- --amp

Flags of train.py go behind `--`. The same command again does what is not done yet, and continues
runs where they were stopped or killed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from timm_structdrop.cli._sweep_progress import SweepProgress
from timm_structdrop.cli._sweep_report import (
    CellResult,
    collect,
    draw_results,
    markdown,
    write_numbers,
)
from timm_structdrop.cli._sweep_runs import Run, Runner
from timm_structdrop.errors import UserError, nearest
from timm_structdrop.files import output_folder, save_json, save_png
from timm_structdrop.recipes import Table, load_table, parse_with_sources, train_parser
from timm_structdrop.recipes.parser import at_least
from timm_structdrop.training.interrupt import StopRequest

__all__ = ["add_flags", "run"]

MANIFEST = "sweep.json"
OURS = ("--recipe", "--config", "-c", "--resume", "--output", "--experiment", "--seed")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m timm_structdrop sweep``."""
    add = parser.add_argument
    add("table", metavar="TABLE", help="a packaged table; python -m timm_structdrop list --recipes")
    add(
        "--seeds",
        type=at_least(1),
        default=3,
        metavar="N",
        help="runs of each cell, with the seeds 0 to N-1",
    )
    add("--jobs", type=at_least(1), default=1, metavar="J", help="runs at a time")
    add("--cells", nargs="+", default=["*"], metavar="NAME", help="only these cells; wildcards")
    add("--data-dir", metavar="DIR", help="folder of the data, for train.py")
    add(
        "--output",
        metavar="DIR",
        help="folder of runs and results; output/sweep/TABLE if not given",
    )
    add("--dry-run", action="store_true", help="print what would run, and what is done")
    parser.usage = "%(prog)s TABLE [flags] [-- flags of train.py]"
    parser.set_defaults(train_flags=[])  # what stands behind --


def run(args: argparse.Namespace) -> None:
    """Train the cells of a table with several seeds, and compare them."""
    if args.jobs > 1 and "--dataset-download" in args.train_flags:
        raise UserError(
            "--dataset-download needs --jobs 1, as runs would write the same files; "
            f"got --jobs {args.jobs}"
        )
    table = load_table(args.table)
    folder = Path(args.output or Path("output", "sweep", table.name))
    check_manifest(folder, table, args.train_flags)
    runs = plan(table, folder, args.cells, args.seeds, args.train_flags)
    place = ["--data-dir", args.data_dir] if args.data_dir else []
    flags = [*place, *args.train_flags]
    if args.dry_run:
        print_plan(runs, flags)
        return
    write_manifest(output_folder(folder), table, args.train_flags)
    for run_ in runs:
        run_.folder.parent.mkdir(exist_ok=True)
    runner = do(table, runs, flags, args.jobs, folder)
    report(table, runs, folder)
    if runner.was_stopped:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(143)
    if runner.failures:
        name, what = next(iter(runner.failures.items()))
        raise UserError(
            f"every run must end well; of {len(runs)}, {len(runner.failures)} did not, such as "
            f"{name}: {what}"
        )


def plan(
    table: Table, folder: Path, patterns: Sequence[str], seeds: int, train_flags: Sequence[str]
) -> list[Run]:
    """Every run, seed by seed, so that all cells have a first result early.

    Raises:
        UserError: no cell is of these names, or train.py does not take the flags.
    """
    reserved = [word for word in train_flags if word.split("=")[0] in OURS]
    if reserved:
        raise UserError(f"the sweep itself sets {', '.join(OURS)}; got {reserved[0]}")
    for pattern in patterns:
        if not any(fnmatch(key, pattern) for key in table.cells):
            raise UserError(
                f"--cells must name cells; got {pattern!r}{nearest(pattern, table.cells)}"
            )
    chosen = [key for key in table.cells if any(fnmatch(key, pattern) for pattern in patterns)]
    epochs = {}
    for key in chosen:
        argv = ["--recipe", table.cells[key].name, *train_flags]
        epochs[key] = parse_with_sources(train_parser(), argv).epochs
    return [
        Run(table.cells[key], seed, folder / key / f"seed-{seed}", epochs[key])
        for seed in range(seeds)
        for key in chosen
    ]


def manifest(table: Table, train_flags: Sequence[str]) -> dict[str, Any]:
    """What a folder of a sweep is of."""
    cells = {key: cell.flags for key, cell in table.cells.items()}
    return {"table": table.name, "train_flags": list(train_flags), "cells": cells}


def check_manifest(folder: Path, table: Table, train_flags: Sequence[str]) -> None:
    """Raise UserError where the folder has something else in it than this sweep."""
    path = folder / MANIFEST
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"--output must be empty or a folder of this sweep; got {folder}")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before, flags, cells = found["table"], found["train_flags"], found["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} must be what a sweep wrote; it is not") from error
    if before != table.name:
        raise UserError(f"{folder} holds a sweep of the table {before}; got {table.name}")
    if flags != list(train_flags):
        raise UserError(
            f"{folder} holds a sweep with the flags {shlex.join(flags)!r}; "
            f"got {shlex.join(train_flags)!r}"
        )
    for key, now in manifest(table, train_flags)["cells"].items():
        if cells.get(key) != now:
            raise UserError(
                f"{folder} holds a sweep in which {table.name}/{key} had other settings than now"
            )


def write_manifest(folder: Path, table: Table, train_flags: Sequence[str]) -> None:
    if not (folder / MANIFEST).is_file():
        save_json(manifest(table, train_flags), folder / MANIFEST)


def print_plan(runs: Sequence[Run], flags: Sequence[str]) -> None:
    """One line a run: what is done, or the command."""
    for each in runs:
        command = "done" if each.is_done() else shlex.join(each.command(flags))
        print(f"{each.name}: {command}")


def do(table: Table, runs: Sequence[Run], flags: Sequence[str], jobs: int, folder: Path) -> Runner:
    """Do what is not done, keeping the results in the folder up to date."""
    left = [each for each in runs if not each.is_done()]
    progress = SweepProgress(table.name, runs)

    def on_change(runner: Runner, ended: bool) -> None:
        if ended:
            write_numbers(table, collect(table, folder, cell_keys(runs)), folder)
        progress.show(runner.running(), runner.elsewhere, ended)

    with StopRequest() as stop:
        runner = Runner(left, flags, jobs, on_change, lambda: stop.requested)
        try:
            runner.run()
        finally:
            progress.close()
    return runner


def cell_keys(runs: Sequence[Run]) -> set[str]:
    return {each.folder.parent.name for each in runs}


def report(table: Table, runs: Sequence[Run], folder: Path) -> None:
    """Print the table and write it with its picture."""
    results: list[CellResult] = collect(table, folder, cell_keys(runs))
    paths = write_numbers(table, results, folder)
    if any(values for result in results for values in result.values.values()):
        print(markdown(table, results))
        try:
            paths.append(save_png(draw_results(table, results), folder / "table.png"))
        except UserError as error:
            print(f"{error}; the numbers are there", file=sys.stderr)
    print("Written:", *paths, sep="\n  ")
