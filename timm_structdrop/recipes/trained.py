"""What a training or a fit left in its folder: the model, and the facts for its card."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from timm_structdrop.data import class_names
from timm_structdrop.errors import UserError, one_line
from timm_structdrop.hub.export import CONFIG
from timm_structdrop.hub.snapshot import read_snapshot
from timm_structdrop.models.weights import load_weights
from timm_structdrop.recipes import load_recipe, recipe_names, train_parser
from timm_structdrop.recipes.build import build_model
from timm_structdrop.recipes.build_datasets import input_settings, normalised_images
from timm_structdrop.recipes.command_line import training_command

__all__ = ["Trained", "read_folder", "read_run", "training_facts"]

DATASET_NAMES = {"digits": "scikit-learn's handwritten digits"}

SAMPLES = 2  # images in the picture of the clusters
# Weights come from the checkpoint, not from where the training once started.
NO_START = {
    "pretrained": False,
    "pretrained_path": None,
    "initial_checkpoint": "",
    "torchcompile": None,
    "grad_checkpointing": False,
}
# Flags that say where and how it ran rather than what was trained.
NOT_TOLD = (
    *("data", "data_dir", "no_resume_opt", "device", "workers", "pin_mem"),
    *("checkpoint_hist", "recovery_interval"),
    *("push_to_hub", "push_every", "hub_license", "hub_private"),
)


@dataclass(frozen=True)
class Trained:
    """A model and what is known of it.

    Attributes:
        model: with its weights, on the CPU.
        facts: see :func:`timm_structdrop.hub.make_card`.
        data: timm's data config of its images, where it is known.
        images: some images of the evaluated split as the model gets them, (N, C, H, W), or None.
    """

    model: nn.Module
    facts: dict[str, Any]
    data: dict[str, Any] | None
    images: Tensor | None


def read_folder(folder: Path) -> Trained:
    """The model in an output folder of train.py, or in one that :func:`export_model` wrote.

    Raises:
        UserError: it is neither, or not whole.
    """
    if not folder.is_dir():
        raise UserError(f"DIR must be an output folder of train.py or of fit; got {folder}")
    return read_exported(folder) if (folder / CONFIG).is_file() else read_run(folder)


def read_exported(folder: Path) -> Trained:
    """The model in a folder that :func:`export_model` wrote.

    Raises:
        UserError: it is not whole.
    """
    try:
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except UserError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{folder} must hold a whole exported model: {one_line(error)}") from error
    labels = model.pretrained_cfg.get("label_names")
    return Trained(model, {"label_names": labels} if labels else {}, None, None)


def read_run(folder: Path) -> Trained:
    """The model of a run of train.py, with the weights that :func:`read_snapshot` chooses.

    Raises:
        UserError: there is no checkpoint, or its settings do not give the model.
    """
    snapshot = read_snapshot(folder)
    defaults = vars(train_parser().parse_flags([]))
    saved = {**defaults, **{k: v for k, v in snapshot.checkpoint.args.items() if k in defaults}}
    flags = argparse.Namespace(**{**saved, **NO_START})
    model = build_model(flags)
    load_weights(model, snapshot.checkpoint, flags.model)
    data = input_settings(flags, model)
    images, of_data = _look_at_data(flags, data, model)
    facts = {
        **training_facts(saved),
        "base_model": _base_model(saved, model),
        **snapshot.figures,
        **of_data,
    }
    facts = {key: value for key, value in facts.items() if value is not None}
    return Trained(model, facts, data, images)


def training_facts(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags of a training say of it, for :func:`timm_structdrop.hub.make_card`.

    The command is without what has to do with the machine it ran on.

    Args:
        flags: as a run's `args.yaml` holds them.
    """
    told = {key: value for key, value in flags.items() if key not in NOT_TOLD}
    if flags.get("data_dir") or flags.get("data"):
        told["data_dir"] = "DIR"
    recipe, dataset = flags.get("recipe"), flags.get("dataset") or None
    return {
        "command": training_command(told),
        "recipe": recipe,
        "recipe_note": load_recipe(recipe).get("note") if recipe in recipe_names() else None,
        "seed": flags.get("seed"),
        "epochs": flags.get("epochs"),
        "dataset": dataset,
        "dataset_name": DATASET_NAMES.get(dataset or "", dataset),
    }


def _base_model(saved: Mapping[str, Any], model: Any) -> str | None:
    """The repository of the weights that the training started from."""
    name = str(saved["model"])
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:").split("@")[0]
    return model.pretrained_cfg.get("hf_hub_id") if saved["pretrained"] else None


def _look_at_data(
    flags: argparse.Namespace, data: Mapping[str, Any], model: Any
) -> tuple[Tensor | None, dict[str, Any]]:
    """Sample images of the evaluated split, and what it tells; nothing where it is not there."""
    if not flags.val_split:
        return None, {}
    try:
        dataset = normalised_images(flags, data, flags.val_split)
        size = len(dataset)
        images = [dataset[index * size // SAMPLES][0] for index in range(min(size, SAMPLES))]
    except (UserError, OSError, TypeError):  # the data are elsewhere, or a stream
        return None, {}
    labels = class_names(dataset)
    known = labels is not None and len(labels) == model.num_classes
    facts = {"split": flags.val_split, "n_eval": size, "label_names": labels if known else None}
    return torch.stack(images), facts
