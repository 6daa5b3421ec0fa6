"""``python -m timm_structdrop COMMAND``: what one does beside training and validating."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from timm_structdrop.errors import UserError, run_command

COMMANDS = {
    "list": "print the registered variants, the layers of a model, or the recipes",
    "inspect": "histograms and pictures of a model's activations and clusters, with the numbers",
    "fit": "fit the clusters of a DropCluster model on one mini-batch and save it",
    "sweep": "run a table of a paper, cell by cell and seed by seed, and compare",
    "push": "push a trained or fitted model to the Hugging Face Hub",
    "package": "put a training's checkpoint into the package, with the facts of how it came about",
    "card": "write the model cards of the packaged checkpoints, or say which are stale",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m timm_structdrop", description="Structured dropout for timm."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = import_module(f"timm_structdrop.commands.{name}")
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_flags(command)
        command.set_defaults(run=module.run)
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    if end < len(argv):
        if not hasattr(args, "train_flags"):
            raise UserError(f"{args.command} takes no flags behind --; got {argv[end + 1 :]}")
        args.train_flags = argv[end + 1 :]
    args.run(args)


if __name__ == "__main__":
    run_command(main)
