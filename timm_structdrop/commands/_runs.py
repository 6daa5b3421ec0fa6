"""What a training left in its output folder: the model, and the facts for its card."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_structdrop.data import class_names
from timm_structdrop.errors import UserError
from timm_structdrop.models.weights import (
    checkpoint_of,
    find_checkpoint,
    load_weights,
    read_file,
)
from timm_structdrop.recipes import load_recipe, recipe_names, train_parser
from timm_structdrop.recipes.build import build_model
from timm_structdrop.recipes.build_datasets import input_settings, normalised_images
from timm_structdrop.recipes.command_line import training_command
from timm_structdrop.training import read_summary

__all__ = ["Trained", "read_run", "training_facts"]

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


def read_run(folder: Path) -> Trained:
    """The best checkpoint of a run of train.py: the weights that its figures are of, which are the
    averaged ones if it kept and evaluated them, or evaluated nothing.

    Its file is read once, because a run that is under way replaces it.

    Raises:
        UserError: there is no checkpoint, or its settings do not give the model.
    """
    path = find_checkpoint(folder)
    content = read_file(path)
    checkpoint = checkpoint_of(content, path)
    if not checkpoint.args:
        raise UserError(f"a run's folder must hold args.yaml; got {folder}")
    averaged, accuracy = _measured(folder, content, checkpoint.args)
    if averaged:
        checkpoint = checkpoint_of(content, path, use_ema=True)
    defaults = vars(train_parser().parse_flags([]))
    saved = {**defaults, **{k: v for k, v in checkpoint.args.items() if k in defaults}}
    flags = argparse.Namespace(**{**saved, **NO_START})
    model = build_model(flags)
    load_weights(model, checkpoint, flags.model)
    data = input_settings(flags, model)
    facts = {
        **training_facts(saved),
        "base_model": _base_model(saved, model),
        **accuracy,
    }
    images, of_data = _look_at_data(flags, data, model)
    facts = {key: value for key, value in {**facts, **of_data}.items() if value is not None}
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


def _measured(
    folder: Path, content: Mapping[str, Any], flags: Mapping[str, Any]
) -> tuple[bool, dict[str, float]]:
    """Whether a checkpoint's averaged weights are to be published, and top-1 and top-5 accuracy, in
    percent, of the weights that are."""
    said = content.get("validation")
    if isinstance(said, Mapping):
        accuracy = {key: said[key] for key in ("top1", "top5") if key in said}
        return said.get("weights") == "state_dict_ema", accuracy
    averaged = bool(flags.get("model_ema"))
    if averaged and flags.get("model_ema_force_cpu"):
        return True, {}  # the figures in summary.csv may be of the others
    return averaged, _accuracy(folder, content.get("epoch"))


def _accuracy(folder: Path, epoch: object) -> dict[str, float]:
    """The figures of an epoch in summary.csv, for a checkpoint without figures, such as timm's."""
    rows = [row for row in read_summary(folder / "summary.csv") if row["epoch"] == str(epoch)]
    last = rows[-1] if rows else {}
    return {key: float(last[f"eval_{key}"]) for key in ("top1", "top5") if last.get(f"eval_{key}")}


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
