"""Push a trained model to the Hugging Face Hub, with its card, in one commit.

DIR is the output folder of train.py, of which the best checkpoint is pushed, or a folder that
`python -m timm_structdrop fit` wrote. The token is the one of `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from timm_structdrop.hub import check_push, push_to_hub
from timm_structdrop.recipes.trained import read_folder

__all__ = ["add_flags", "push_command", "run"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m timm_structdrop push``."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="what to push")
    add("repo", metavar="REPO", help="where to: user/name; made if it is not there")
    add("--license", required=True, metavar="ID", help="of the weights, such as apache-2.0")
    add("--private", action="store_true", default=None, help="a repository only its owner sees")
    add("--revision", metavar="BRANCH", help="branch to push to, made if needed; main if not given")
    add("--message", default="Upload model", metavar="TEXT", help="first line of the commit")


def run(args: argparse.Namespace) -> None:
    """Push a folder to the Hugging Face Hub."""
    check_push(args.repo, args.license)
    trained = read_folder(Path(args.folder))
    info = push_to_hub(
        trained.model,
        args.repo,
        license=args.license,
        facts=trained.facts,
        private=args.private,
        revision=args.revision,
        commit_message=args.message,
        data_config=trained.data,
        images=trained.images,
    )
    name = args.repo if args.revision is None else f"{args.repo}@{args.revision}"
    print(
        f"Pushed to {info.commit_url}. To load it:\n  import timm, timm_structdrop\n"
        f'  model = timm.create_model("hf-hub:{name}", pretrained=True)'
    )


def push_command(folder: Path, repo_id: str, license: str, private: bool) -> list[str]:
    """What Python is to run to push ``folder``."""
    flags = ["--license", license, *(["--private"] if private else [])]
    return ["-m", "timm_structdrop", "push", str(folder), repo_id, *flags]
