"""What the commands write to the terminal while they work, and how they call each other there."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from huggingface_hub.utils import logging as hub_logging

__all__ = ["PROGRAM", "called", "log_to_terminal"]

PROGRAM = "timm-structdrop"


def log_to_terminal(is_first: bool = True) -> None:
    """Messages of the package as plain lines on stderr, warnings alone from other libraries; of a
    distributed run's processes, only the first says more than warnings."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("timm_structdrop").setLevel(logging.INFO if is_first else logging.WARNING)
    hub_logging.disable_propagation()  # it has a handler of its own


def called(command: str) -> list[str]:
    """What to type for a command, in the way in which the one that is running was called: the
    script of a clone, the installed program, or the package's module."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return ["python", "-m", "timm_structdrop", command]
    if started.stem == PROGRAM:
        return [PROGRAM, command]
    return ["python", f"{command}.py"]
