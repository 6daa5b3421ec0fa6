"""The speed benchmarks as one command."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from benchmarks._page import read, section, write
from benchmarks._record import RESULTS, circumstances
from benchmarks._settings import Settings
from benchmarks._timing import one_thread
from timm_structdrop.errors import UserError, run_command
from timm_structdrop.files import output_folder
from timm_structdrop.recipes.parser import FlagParser
from timm_structdrop.training.progress import format_seconds

__all__ = ["SPEED", "alone", "main"]

# Modules of this folder, each with TITLE, run(settings), headline(rows) and report(rows); CPU_ONLY
# and draw(rows) if need be.
SPEED = (
    "imports",
    "dropblock",
    "rena",
    "steps",
    "camdrop",
    "rblock",
    "refits",
    "checkpoint",
    "growth",
)
PACKAGES = ("torch", "timm", "torchvision", "nilearn")
# A benchmark that needs one of these is left out where it is missing.
OPTIONAL = ("matplotlib", "nibabel", "nilearn")
STUDIES = "gradient_bound, lr_gamma and digits_study"


def flags() -> FlagParser:
    parser = FlagParser(
        usage="python -m benchmarks [NAME ...] [flags]",
        formatter_class=argparse.HelpFormatter,
        description="Measure the speed that the documentation states: all benchmarks one after "
        "another on one thread (about 20 minutes on two cores), or the named ones.",
        epilog=f"The studies ({STUDIES}) measure no speed, take longer and are not run here: "
        "python -m benchmarks.NAME --help.",
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"{', '.join(SPEED)} (all)")
    add("--quick", action="store_true", help="small sizes, few rounds: figures to look at only")
    add("--repeats", type=int, metavar="N", help="rounds of every benchmark (each has its own)")
    add("--device", default="cpu", metavar="NAME", help="cpu or cuda (cpu)")
    add(
        "--output",
        metavar="DIR",
        help=f"for the JSON, the page and the picture ({RESULTS.name}/ beside the benchmarks for a "
        "whole run; one that is quick or of named ones is written only where this says)",
    )
    add(
        "--rewrite",
        action="store_true",
        help="measure nothing: page, picture and summary again from the recorded speed.json",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmarks that the flags name, print what they find, and write it."""
    args = flags().parse_flags(argv)
    names, settings = chosen(args.names), checked(args)
    whole = not args.names and not args.quick
    folder = output_folder(args.output) if args.output else RESULTS if whole else None
    if args.rewrite:
        if not whole:
            raise UserError("--rewrite must come without names and --quick: it measures nothing")
        results = read(folder / "speed.json")
    else:
        results = measured(names, settings)
    if folder is not None:
        for path in write(results, folder, args.names):
            say(f"Written: {path}")


def alone(name: str) -> None:
    """The command of one benchmark: ``python -m benchmarks NAME`` with the flags given."""
    run_command(lambda: main([name, *sys.argv[1:]]))


def chosen(names: Sequence[str]) -> list[str]:
    """The benchmarks to run, in the order of the suite."""
    for name in names:
        if name not in SPEED:
            raise UserError(f"a benchmark must be one of {', '.join(SPEED)}; got {name!r}")
    return [name for name in SPEED if name in names or not names]


def checked(args: argparse.Namespace) -> Settings:
    if args.repeats is not None and args.repeats < 1:
        raise UserError(f"--repeats must be at least 1; got {args.repeats}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if args.device not in devices:
        raise UserError(f"--device must be {' or '.join(devices)} here; got {args.device!r}")
    return Settings(args.quick, args.repeats, args.device)


def measured(names: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run benchmarks; what is known of the run, and their rows by name."""
    with one_thread():
        facts = circumstances("benchmarks", PACKAGES)
    if settings.device == "cuda":
        facts["hardware"] += f"; {torch.cuda.get_device_name()}"
    date = datetime.now(timezone.utc).isoformat(timespec="minutes")
    results: dict[str, Any] = {
        **facts,
        "date": date,
        "device": settings.device,
        "quick": settings.quick,
        "benchmarks": {},
        "skipped": {},
    }
    start = time.perf_counter()
    for number, name in enumerate(names, 1):
        place = f"[{number}/{len(names)}] {name}"
        say(place)
        load = os.getloadavg()[0]
        began = time.perf_counter()
        module = available(name, settings)
        if isinstance(module, str):
            results["skipped"][name] = module
            say(f"{place} is skipped: {module}")
            continue
        rows = module.run(settings)
        now = time.perf_counter()
        results["benchmarks"][name] = {"seconds": now - began, "load": load, "rows": rows}
        print(*section(module, rows), "", sep="\n", flush=True)
        left = ", ".join(names[number:]) or "nothing"
        say(
            f"{place} took {format_seconds(now - began)}, {format_seconds(now - start)} in all; "
            f"left: {left}"
        )
    return results


def available(name: str, settings: Settings) -> ModuleType | str:
    """The module of a benchmark, or why it cannot run here."""
    try:
        module = import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in OPTIONAL:
            raise
        return f'{package} is not installed (pip install -e ".[test]")'
    if settings.device != "cpu" and getattr(module, "CPU_ONLY", False):
        return "it measures the CPU only"
    return module


def say(line: str) -> None:
    """Progress: not among the results."""
    print(line, file=sys.stderr, flush=True)
