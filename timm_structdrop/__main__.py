"""``python -m timm_structdrop COMMAND``: what one does beside training and validating."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module

from timm_structdrop.errors import UserError, nearest, run_command
from timm_structdrop.recipes import FlagParser

PROGRAM = "python -m timm_structdrop"
COMMANDS = {
    "list": "print the registered variants, the layers of a model, or the recipes",
    "inspect": "histograms and pictures of a model's activations and clusters, with the numbers",
    "fit": "fit the clusters of a DropCluster model on one mini-batch and save it",
    "sweep": "run a table of a paper, cell by cell and seed by seed, and compare",
    "push": "push a trained or fitted model to the Hugging Face Hub",
}


def main(argv: Sequence[str] | None = None) -> None:
    name, *words = list(sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(overview())
        return
    if name not in COMMANDS:
        got = f"{name!r}{nearest(name, COMMANDS, n=1)}" if name else "none"
        raise UserError(f"COMMAND must be one of {', '.join(COMMANDS)}; got {got}")
    module = import_module(f"timm_structdrop.commands.{name}")
    parser = command_parser(name)
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_flags(words[:end])
    if end < len(words):
        if not hasattr(args, "train_flags"):
            raise UserError(f"{name} takes no flags behind --; got {words[end + 1 :]}")
        args.train_flags = words[end + 1 :]
    module.run(args)


def command_parser(name: str) -> FlagParser:
    """The parser of a command, without what stands behind ``--``."""
    module = import_module(f"timm_structdrop.commands.{name}")
    parser = FlagParser(prog=f"{PROGRAM} {name}", description=module.__doc__)
    module.add_flags(parser)
    return parser


def overview() -> str:
    """What there is, for ``--help``."""
    width = min(shutil.get_terminal_size().columns, 100) - 2
    lines = [
        textwrap.fill(summary, width, initial_indent=f"  {name:9}", subsequent_indent=" " * 11)
        for name, summary in COMMANDS.items()
    ]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND ...",
            "",
            "Structured dropout for timm, beside train.py and validate.py. COMMAND is one of",
            "",
            *lines,
            "",
            "each of which has a --help of its own.",
        ]
    )


if __name__ == "__main__":
    run_command(main)
