"""What a recorded measurement says of itself, and trainings that a benchmark runs."""

import argparse
import contextlib
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import timm_structdrop
from timm_structdrop.cli import train
from timm_structdrop.errors import UserError
from timm_structdrop.files import save_json, save_text

__all__ = [
    "RESULTS",
    "ROOT",
    "add_output",
    "circumstances",
    "output_stem",
    "quietly_trained",
    "write_study",
]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def circumstances(module: str, packages: Sequence[str] = ("torch", "timm")) -> dict[str, Any]:
    """Command, versions and hardware, JSON-able.

    Args:
        module: what is running, ``benchmarks`` or in it ``benchmarks.<module>``.
        packages: whose versions matter; those that are not installed are left out.
    """
    versions = {
        "timm_structdrop": timm_structdrop.__version__,
        "python": platform.python_version(),
    }
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "versions": versions,
        "hardware": f"{_processor()}, {os.cpu_count()} cores ({platform.machine()}), "
        f"{torch.get_num_threads()} of them used",
    }


def _processor() -> str:
    """The name of the CPU where Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "CPU"


@contextlib.contextmanager
def _into(path: Path) -> Iterator[None]:
    """What is printed inside goes to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(path, "w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


def quietly_trained(folder: Path, flags: Sequence[str]) -> Path:
    """Run train.py in this process, its output in ``train.log`` of the run's folder.

    Args:
        folder: of the run; it must not hold one.
        flags: of train.py.

    Returns:
        ``folder``.
    """
    where = ["--output", str(folder.parent), "--experiment", folder.name]
    with _into(folder / "train.log"):
        train.main([*flags, *where])
    return folder


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    """The flag for where a study writes, ``benchmarks/results/<name>`` without it."""
    parser.add_argument(
        "--output",
        default=str(RESULTS / name),
        metavar="PATH",
        help=f"without .json and .md (benchmarks/results/{name})",
    )


def output_stem(path: str | Path) -> Path:
    """Where a study writes, without the endings. UserError where the folder is not there, before a
    training rather than after it."""
    if not Path(path).parent.is_dir():
        raise UserError(f"--output must be in a folder that is there; got {path}")
    return Path(path)


def write_study(results: dict[str, Any], text: str, output: Path) -> None:
    """Print ``text``; write it and the ``results`` it is of as ``output`` with .md and .json."""
    save_json(results, output.with_suffix(".json"))
    save_text(text, output.with_suffix(".md"))
    print(text)
