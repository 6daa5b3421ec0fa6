"""What a recorded measurement says of itself, and trainings that a benchmark runs."""

import contextlib
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import timm_structdrop
import train

__all__ = ["ROOT", "circumstances", "quietly_trained"]

ROOT = Path(__file__).parent.parent


def circumstances(module: str) -> dict[str, Any]:
    """Command, versions and hardware, JSON-able; ``module`` of this folder is what is running."""
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]]),
        "versions": {
            "timm_structdrop": timm_structdrop.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), "
        f"{torch.get_num_threads()} of them used",
    }


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
