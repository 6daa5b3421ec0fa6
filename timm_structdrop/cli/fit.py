"""Fit the clusters of a DropCluster model on one mini-batch and save it as a folder for timm.

After `import timm_structdrop`, `timm.create_model("local-dir:DIR", pretrained=True)` loads it with
its clusters and settings. The activations are those of a training step (batch norms in training
mode, images without augmentation); running statistics stay as they were.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from timm.models import list_models

from timm_structdrop.analysis import cluster_places, fit_clusters
from timm_structdrop.cli._images import add_subject_flags, load_subject
from timm_structdrop.errors import UserError, nearest
from timm_structdrop.files import output_folder
from timm_structdrop.hub import export_model
from timm_structdrop.words import table

__all__ = ["add_flags", "run"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m timm_structdrop fit``."""
    add_subject_flags(parser, split="train", num_images=256)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="a new or empty folder for the model"
    )


def run(args: argparse.Namespace) -> None:
    """Fit the clusters of a model on images and write it into a folder."""
    folder = new_folder(args.output)
    subject = load_subject(args)
    if not cluster_places(subject.model):
        hint = nearest(subject.name, list_models("*_dropcluster"))
        raise UserError(f"MODEL must have a DropCluster layer; {subject.name} has none{hint}")
    fits = fit_clusters(subject.model, subject.images)
    export_model(subject.model, folder, data_config=subject.data)
    rows = [
        [
            name,
            str(facts["n_clusters"]),
            str(facts["channels"]),
            str(facts["unstructured"]),
            f"{facts['seconds']:.2f}",
        ]
        for name, facts in fits.items()
    ]
    weights = subject.facts["weights"]
    print(f"{subject.name} ({weights} weights), fitted on {subject.images_text()}\n")
    print(table(["layer", "clusters", "channels", "unstructured", "seconds"], rows))
    print(
        f"\nSaved to {folder}. To load it:\n  import timm, timm_structdrop\n"
        f'  model = timm.create_model("local-dir:{folder}", pretrained=True)'
    )


def new_folder(path: str) -> Path:
    """The folder ``path``, which is not there yet or empty, in a folder that can be written to.

    Raises:
        UserError: it holds something, is a file, or cannot be made.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output must be a new or empty folder; got {folder}")
    output_folder(folder.absolute().parent)
    return folder
