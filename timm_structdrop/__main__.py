"""``timm-structdrop COMMAND``, which is ``python -m timm_structdrop COMMAND`` too."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module

from timm_structdrop.errors import UserError, nearest, run_command
from timm_structdrop.recipes import FlagParser, train_parser
from timm_structdrop.recipes.console import PROGRAM
from timm_structdrop.recipes.validate_flags import validate_parser
from timm_structdrop.version import __version__

COMMANDS = {
    "train": "train a model with timm's flags, or by a recipe",
    "validate": "evaluate a model, or how robust it is",
    "list": "print the registered variants, the layers of a model, or the recipes",
    "inspect": "histograms and pictures of a model's activations and clusters, with the numbers",
    "fit": "fit the clusters of a DropCluster model on one mini-batch and save it",
    "sweep": "run a table of a paper, cell by cell and seed by seed, and compare",
    "push": "push a trained or fitted model to the Hugging Face Hub",
}

# of the commands that read their flags themselves
PARSERS = {"train": train_parser, "validate": validate_parser}


def main(argv: Sequence[str] | None = None) -> None:
    name, *words = list(sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(overview())
        return
    if name == "--version":
        print(f"{PROGRAM} {__version__}")
        return
    if name not in COMMANDS:
        got = f"{name!r}{nearest(name, COMMANDS, n=1)}" if name else "none"
        raise UserError(f"COMMAND must be one of {', '.join(COMMANDS)}; got {got}")
    module = import_module(f"timm_structdrop.cli.{name}")
    if name in PARSERS:
        module.main(words)
        return
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
    if name in PARSERS:
        return PARSERS[name]()
    module = import_module(f"timm_structdrop.cli.{name}")
    parser = FlagParser(prog=f"{PROGRAM} {name}", description=module.__doc__)
    module.add_flags(parser)
    return parser


def overview() -> str:
    """What there is, for ``--help``."""
    width = min(shutil.get_terminal_size().columns, 100) - 2
    lines = [
        textwrap.fill(summary, width, initial_indent=f"  {name:9} ", subsequent_indent=" " * 12)
        for name, summary in COMMANDS.items()
    ]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND ...",
            "",
            "Structured dropout for timm. COMMAND is one of",
            "",
            *lines,
            "",
            "each of which has a --help of its own; --version says which release this is.",
        ]
    )


def run() -> None:
    """The program that an installation puts on the path."""
    run_command(main)


if __name__ == "__main__":
    run()
