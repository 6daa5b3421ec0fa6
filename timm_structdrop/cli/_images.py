"""A model and images to run through it, from flags that the commands share."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from timm_structdrop.data import class_names
from timm_structdrop.errors import UserError
from timm_structdrop.models.weights import Checkpoint, load_weights, read_checkpoint
from timm_structdrop.recipes import train_parser
from timm_structdrop.recipes.build import build_model
from timm_structdrop.recipes.build_datasets import input_settings, normalised_images
from timm_structdrop.recipes.device import chosen_device
from timm_structdrop.recipes.flags import add_drop_block_flag, add_settings_flags
from timm_structdrop.recipes.parser import at_least
from timm_structdrop.recipes.validate_flags import ARCHITECTURE_KEYS, INPUT_KEYS
from timm_structdrop.training import derive_seed, seed_everything
from timm_structdrop.words import counted

__all__ = ["Subject", "add_subject_flags", "load_subject"]

# Flags of train.py that a checkpoint's training decides, unless they are given.
FROM_CHECKPOINT = (
    *(*INPUT_KEYS, *ARCHITECTURE_KEYS),
    *("data", "data_dir", "input_key", "target_key", "drop_block"),
)
DATA_CONFIG = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


@dataclass(frozen=True)
class Subject:
    """What a command works on.

    Attributes:
        name: the model's name; of a folder or repository, the architecture in it.
        model: in eval mode, on its device.
        images: normalised, (N, C, H, W), on the CPU.
        data: timm's data config of the images.
        facts: where model and images come from, JSON-able.
        targets: the images' classes, (N,) int64.
        class_names: by class, where the data set has names.
    """

    name: str
    model: nn.Module
    images: Tensor
    data: dict[str, Any]
    facts: dict[str, Any]
    targets: Tensor
    class_names: list[str] | None

    def images_text(self) -> str:
        """The images in words: how many, of which split, at which size."""
        channels, height, width = self.facts["input_size"]
        return (
            f"{counted(self.facts['num_images'], self.facts['split'] + ' image')} of "
            f"{self.facts['dataset']} "
            f"({channels}x{height}x{width})"
        )


def add_subject_flags(parser: argparse.ArgumentParser, split: str, num_images: int) -> None:
    """The flags that :func:`load_subject` reads, with a command's own defaults for two of them."""
    parser.add_argument("model", metavar="MODEL", help="any model of timm or of this package")
    add = parser.add_argument_group("Model").add_argument
    add("--checkpoint", default="", metavar="PATH", help="weights: a file, or the folder of a run")
    add("--use-ema", action="store_true", help="the averaged weights of the checkpoint")
    add("--pretrained", action="store_true", help="the model's pretrained weights")
    add_settings_flags(add)
    parser.set_defaults(structdrop=None)  # that of the checkpoint's training
    add(
        "--img-size",
        type=at_least(1),
        metavar="N",
        help="height and width of the images in pixels; the model's default if not given",
    )
    add(
        "--in-chans",
        type=at_least(1),
        metavar="N",
        help="channels of the images; the model's default if not given",
    )
    add_drop_block_flag(add)
    add("--device", metavar="NAME", help="cpu, cuda, ...; cuda where there is one, else cpu")
    add = parser.add_argument_group("Images").add_argument
    add(
        "--dataset",
        metavar="NAME",
        help="digits, tiny_imagenet, or timm's <type>/<name>; the checkpoint's if not given",
    )
    add("--data-dir", metavar="DIR", help="folder of the data")
    add("--split", default=split, metavar="NAME", help="which of its images")
    add(
        "--num-images",
        type=at_least(1),
        default=num_images,
        metavar="N",
        help="images drawn at random from the split",
    )
    add("--seed", type=at_least(0), default=42, metavar="S", help="all randomness comes from it")


def load_subject(args: argparse.Namespace) -> Subject:
    """Build the model, load its weights, draw the images.

    What is not given as a flag (data set, image size, classes, the model's settings) is taken from
    the settings a checkpoint was trained with.

    Raises:
        UserError: a flag does not fit the model, or a file is not there or not right.
    """
    if args.checkpoint and args.pretrained:
        raise UserError("weights come from --checkpoint or from --pretrained; got both")
    device = chosen_device(args.device)
    checkpoint = read_checkpoint(args.checkpoint, args.use_ema) if args.checkpoint else None
    flags = _with_training_flags(args, checkpoint)
    seed_everything("model", flags.seed)
    model = build_model(flags)
    if checkpoint is not None:
        load_weights(model, checkpoint, flags.model)
    data = _data_config(flags, model)
    images, targets, names = _draw_images(flags, data)
    model = model.to(device).eval()
    weights = str(checkpoint.path) if checkpoint else "pretrained" if flags.pretrained else "random"
    facts = {
        "model": flags.model,
        "weights": weights,
        "dataset": flags.dataset or "folder",
        "split": flags.split,
        "num_images": len(images),
        "input_size": list(images.shape[1:]),
        "seed": flags.seed,
    }
    name = _short_name(flags.model, model)
    return Subject(name, model, images, data, facts, targets, names)


def _short_name(name: str, model: nn.Module) -> str:
    return str(model.pretrained_cfg["architecture"]) if ":" in name else name  # type: ignore[index]


def _with_training_flags(
    args: argparse.Namespace, checkpoint: Checkpoint | None
) -> argparse.Namespace:
    """Flags over the settings of the checkpoint's training over the defaults of train.py."""
    flags = vars(train_parser().parse_flags([]))
    flags["dataset"] = None
    saved = checkpoint.args if checkpoint else {}
    flags.update({key: saved[key] for key in FROM_CHECKPOINT if saved.get(key) is not None})
    given = {key: value for key, value in vars(args).items() if value not in (None, {})}
    if "data_dir" in given:
        flags["dataset"] = ""
    flags.update(given)
    return argparse.Namespace(**flags)


def _data_config(flags: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    data = input_settings(flags, model)
    return {name: data[name] for name in DATA_CONFIG}


def _draw_images(
    flags: argparse.Namespace, data: dict[str, Any]
) -> tuple[Tensor, Tensor, list[str] | None]:
    """Images of the split as the model gets them at evaluation, their classes and the classes'
    names, drawn without replacement; all of a smaller data set, and the first ones of an iterable
    data set."""
    if flags.dataset is None:
        raise UserError(
            "--data-dir must name a folder of images, or --dataset a data set (digits); got none"
        )
    dataset = normalised_images(flags, data, flags.split)
    if isinstance(dataset, IterableDataset):
        drawn = list(islice(dataset, flags.num_images))
    else:
        generator = torch.Generator().manual_seed(derive_seed("images", flags.seed))
        order = torch.randperm(len(dataset), generator=generator)
        drawn = [dataset[index] for index in order[: flags.num_images].tolist()]
    if not drawn:
        raise UserError(f"the split {flags.split!r} must have images; got none")
    images, targets = zip(*drawn, strict=True)
    return torch.stack(images), torch.tensor(targets), class_names(dataset)
