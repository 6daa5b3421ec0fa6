"""A model on its device with the images to evaluate it on, from the flags of validate.py."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from timm_structdrop.data import class_names
from timm_structdrop.errors import UserError
from timm_structdrop.evaluation import CorruptedDataset, accuracy_row
from timm_structdrop.models.weights import Checkpoint
from timm_structdrop.recipes import build_datasets
from timm_structdrop.recipes.build_data import validation_batches
from timm_structdrop.recipes.train_flags import train_parser
from timm_structdrop.words import counted

__all__ = [
    "Subject",
    "check_classes",
    "data_config",
    "evaluation_batches",
    "place_model",
    "with_training_defaults",
]


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        flags: those of validate.py.
        model: on its device, compiled if the flags say so.
        loader: batches of normalised images and classes.
        data: timm's data config of the images.
        n_parameters: of the model.
        checkpoint: file of the weights, None for pretrained ones.
        note: what was done to the model for this evaluation, in words.
    """

    flags: argparse.Namespace
    model: nn.Module
    loader: Any
    data: dict[str, Any]
    device: torch.device
    n_parameters: int
    checkpoint: Path | None
    note: str = ""

    def how(self) -> dict[str, Any]:
        """Keywords that ``evaluate`` and ``evaluate_attack`` share."""
        flags = self.flags
        amp: Any = nullcontext
        if flags.amp:
            amp = partial(torch.autocast, self.device.type, dtype=getattr(torch, flags.amp_dtype))
        return {
            "device": self.device,
            "amp_autocast": amp,
            "channels_last": flags.channels_last,
            "model_dtype": getattr(torch, flags.model_dtype) if flags.model_dtype else None,
        }

    def row(self, figures: Mapping[str, float]) -> dict[str, Any]:
        """Figures of ``evaluate`` in timm's columns."""
        return accuracy_row(
            self.flags.model, figures, self.n_parameters, self.data, self.checkpoint
        )


def with_training_defaults(flags: argparse.Namespace) -> argparse.Namespace:
    """The flags with those only train.py has, whose defaults change nothing at evaluation."""
    return argparse.Namespace(**{**vars(train_parser().parse_flags([])), **vars(flags)})


def data_config(
    flags: argparse.Namespace, model: nn.Module, checkpoint: Checkpoint | None
) -> dict[str, Any]:
    """Size, crop and normalisation: timm's test settings, for a training's checkpoint its own.

    Raises:
        UserError: the mean or the deviation does not fit the channels.
    """
    trained_here = checkpoint is not None and bool(checkpoint.args)
    use_test_size = not (flags.use_train_size or trained_here)
    return build_datasets.data_config(flags, model, use_test_size)


def evaluation_batches(
    flags: argparse.Namespace, data: Mapping[str, Any], device: torch.device
) -> Any:
    """The loader of the evaluated split; with --corruptions, over a `CorruptedDataset`.

    Raises:
        UserError: the data are not there, or cannot be corrupted.
    """
    settings = with_training_defaults(flags)
    if not flags.corruptions:
        return validation_batches(settings, data, device)
    if data["input_size"][0] not in (1, 3):
        channels = data["input_size"][0]
        raise UserError(
            f"corruptions need gray or RGB images; the model has {counted(channels, 'channel')}"
        )
    settings.no_prefetcher = False  # with it, images are normalised after they are corrupted
    wrap = partial(CorruptedDataset, seed=flags.seed)
    return validation_batches(settings, data, device, wrap=wrap)


def check_classes(model: Any, loader: Any) -> None:
    """Raise UserError when the data have more classes than the model has outputs."""
    classes = class_names(loader.dataset)
    if classes is not None and len(classes) > model.num_classes:
        raise UserError(
            f"the model must have an output for each of the {len(classes)} classes of the data; "
            f"it has {model.num_classes}"
        )


def place_model(flags: argparse.Namespace, model: nn.Module, device: torch.device) -> Any:
    """The model on its device, in the layout and precision of the flags, compiled if they say so.

    Raises:
        UserError: torch.compile does not take its flags.
    """
    dtype = getattr(torch, flags.model_dtype) if flags.model_dtype else None
    model = model.to(device=device, dtype=dtype)
    if flags.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if not flags.torchcompile:
        return model
    try:
        return torch.compile(model, backend=flags.torchcompile, mode=flags.torchcompile_mode)
    except RuntimeError as error:
        raise UserError(f"torch.compile does not take these flags: {error}") from error
