"""Push a trained model to the Hugging Face Hub, with its card, in one commit.

DIR is the output folder of train.py, of which the best checkpoint is pushed, or a folder that
`python -m timm_structdrop fit` wrote. The token is the one of `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm

from timm_structdrop.commands._runs import Trained, read_run
from timm_structdrop.errors import UserError, one_line
from timm_structdrop.hub import check_push, push_to_hub
from timm_structdrop.hub.export import CONFIG

__all__ = ["add_flags", "run"]


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


def read_folder(folder: Path) -> Trained:
    """The model in a run's folder or in an exported one.

    Raises:
        UserError: it is neither, or not whole.
    """
    if not folder.is_dir():
        raise UserError(f"DIR must be an output folder of train.py or of fit; got {folder}")
    return read_exported(folder) if (folder / CONFIG).is_file() else read_run(folder)


def read_exported(folder: Path) -> Trained:
    try:
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except UserError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{folder} must hold a whole exported model: {one_line(error)}") from error
    labels = model.pretrained_cfg.get("label_names")
    return Trained(model, {"label_names": labels} if labels else {}, None, None)
