"""Data sets and loaders from flags."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import FastCollateMixup, Mixup, create_loader, create_transform, resolve_data_config
from torch import nn
from torch.utils.data import IterableDataset

from timm_structdrop.data import SeededDataset, class_names, create_dataset
from timm_structdrop.data.factory import FOLDER_NAMES, has_splits
from timm_structdrop.errors import UserError, nearest
from timm_structdrop.evaluation import evaluate
from timm_structdrop.models._trace import first_conv
from timm_structdrop.training import Progress

__all__ = [
    "check_interpolation",
    "evaluation",
    "input_settings",
    "normalised_images",
    "training_batches",
    "validation_batches",
]

_logger = logging.getLogger(__name__)

INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "box", "hamming", "lanczos")


def input_settings(flags: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Input size, normalisation and resizing: what the flags say, else what the model says.

    Raises:
        UserError: the mean, the deviation or the interpolation is not one that fits.
    """
    channels = first_conv(model).in_channels
    for name in ("mean", "std"):
        values = getattr(flags, name)
        if values is not None and len(values) not in (1, channels):
            raise UserError(f"--{name} must be one value or {channels}; got {len(values)}")
    check_interpolation(flags.interpolation)
    if flags.train_interpolation != "random":
        check_interpolation(flags.train_interpolation)
    settings = dict(vars(flags))
    if not settings.get("input_size"):
        # timm takes three channels for granted with --img-size, and the model's size otherwise
        size = settings.get("img_size")
        height, width = (size, size) if size else model.pretrained_cfg["input_size"][1:]
        settings["input_size"] = (channels, height, width)
    return resolve_data_config(settings, model=model)


def check_interpolation(name: str) -> None:
    """Raise UserError for a way of resizing that timm does not have; '' stands for the model's."""
    if name and name not in INTERPOLATIONS:
        raise UserError(f"unknown interpolation {name!r}{nearest(name, INTERPOLATIONS)}")


def training_batches(
    flags: argparse.Namespace,
    data: Mapping[str, Any],
    num_classes: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Any, Mixup | None]:
    """The training loader, and mixup where the loader does not do it (without the prefetcher).

    Args:
        flags: those of train.py.
        data: what ``timm.data.resolve_data_config`` says of the model.
        num_classes: outputs of the model.
        device: where batches go.
        rank: this process.
        world_size: number of processes.

    Raises:
        UserError: the data are not there, hold more classes than the model has outputs, or fewer
            images than one batch.
    """
    dataset = _dataset(flags, data, is_training=True)
    classes = class_names(dataset)
    if classes is not None and len(classes) > num_classes:
        raise UserError(
            f"the model must have an output for each of the {len(classes)} classes of the data "
            f"(--num-classes); got {num_classes}"
        )
    if classes is not None and len(classes) < num_classes and rank == 0:
        _logger.warning(
            f"The model has {num_classes} outputs, the data have {len(classes)} classes: "
            f"--num-classes {len(classes)} makes them equal"
        )
    if not isinstance(dataset, IterableDataset):
        if len(dataset) < flags.batch_size * world_size:
            raise UserError(
                f"--batch-size must be at most the {len(dataset)} training images divided by "
                f"the processes ({world_size}); got {flags.batch_size}"
            )
        dataset = SeededDataset(dataset, flags.seed, rank)
    mix = _mixup_settings(flags, num_classes)
    try:
        loader = create_loader(
            dataset,
            batch_size=flags.batch_size,
            is_training=True,
            collate_fn=FastCollateMixup(**mix) if mix and not flags.no_prefetcher else None,
            # workers that stay alive would not hear of mixup being switched off
            persistent_workers=not (mix and flags.mixup_off_epoch),
            **_augmentation(flags, data),
            **_loading(flags, data, device, world_size),
        )
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the augmentation flags must be timm's; got {error!r}") from error
    return loader, Mixup(**mix) if mix and flags.no_prefetcher else None


def evaluation(
    flags: argparse.Namespace,
    data: Mapping[str, Any],
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Callable[[nn.Module, str], dict[str, float]] | None:
    """What computes ``loss``, ``top1`` and ``top5`` of a model on the evaluated split; None
    without one. Arguments and errors as for `training_batches`."""
    if not flags.val_split:
        return None
    loader = validation_batches(flags, data, device, world_size)
    folder = flags.data_dir or flags.data
    if flags.dataset in FOLDER_NAMES and Path(folder).is_dir() and not has_splits(folder):
        _logger.warning(
            f"{folder} has no folders train/ and validation/: every image is trained on, and the "
            "accuracy is that on the same images"
        )
    autocast: Callable[[], Any] = nullcontext
    if flags.amp:
        autocast = partial(torch.autocast, device.type, dtype=getattr(torch, flags.amp_dtype))

    def figures(model: nn.Module, title: str) -> dict[str, float]:
        found = evaluate(
            model,
            loader,
            device=device,
            amp_autocast=autocast,
            channels_last=flags.channels_last,
            progress=Progress(title, len(loader), flags.log_interval, enabled=rank == 0),
        )
        return {name: found[name] for name in ("loss", "top1", "top5")}

    return figures


def validation_batches(
    flags: argparse.Namespace,
    data: Mapping[str, Any],
    device: torch.device,
    world_size: int = 1,
    wrap: Callable[[Any], Any] | None = None,
) -> Any:
    """The loader of the evaluated split; arguments and errors as for `training_batches`.

    `wrap` may put something around the data set, between its transform and the loader.
    """
    dataset = _dataset(flags, data, is_training=False)
    return create_loader(
        dataset if wrap is None else wrap(dataset),
        batch_size=flags.validation_batch_size or flags.batch_size,
        is_training=False,
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
        crop_mode=data["crop_mode"],
        **_loading(flags, data, device, world_size),
    )


def normalised_images(flags: argparse.Namespace, data: Mapping[str, Any], split: str) -> Any:
    """The data set of a split whose images are as the model gets them at evaluation, (C, H, W).

    Args:
        flags: the data set's, as of train.py.
        data: timm's data config.
        split: which images.

    Raises:
        UserError: the data are not there.
    """
    dataset = create_dataset(
        flags.dataset,
        flags.data_dir or flags.data,
        split,
        input_img_mode=_image_mode(flags, data),
        class_map=flags.class_map,
        input_key=flags.input_key,
        target_key=flags.target_key,
    )
    dataset.transform = create_transform(**data)
    return dataset


def _image_mode(flags: argparse.Namespace, data: Mapping[str, Any]) -> str:
    return flags.input_img_mode or ("RGB" if data["input_size"][0] == 3 else "L")


def _dataset(flags: argparse.Namespace, data: Mapping[str, Any], is_training: bool) -> Any:
    training_only: dict[str, Any] = {}
    if is_training and flags.train_fraction is not None:
        seed = flags.train_fraction_seed
        training_only = {
            "share": flags.train_fraction,
            "share_seed": flags.seed if seed is None else seed,
        }
    if is_training and not flags.no_aug:
        for name in ("crop_padding", "rotation", "shift"):
            training_only[name] = getattr(flags, name)
    num_samples = flags.train_num_samples if is_training else flags.val_num_samples
    dataset = create_dataset(
        flags.dataset,
        flags.data_dir or flags.data,
        flags.train_split if is_training else flags.val_split,
        is_training=is_training,
        input_img_mode=_image_mode(flags, data),
        class_map=flags.class_map,
        download=flags.dataset_download,
        seed=flags.seed,
        batch_size=flags.batch_size,
        repeats=flags.epoch_repeats if is_training else 0,
        input_key=flags.input_key,
        target_key=flags.target_key,
        num_samples=num_samples,
        trust_remote_code=flags.dataset_trust_remote_code,
        **training_only,
    )
    if num_samples and not isinstance(dataset, IterableDataset):
        flag = "--train-num-samples" if is_training else "--val-num-samples (--num-samples)"
        raise UserError(
            f"{flag} says how long a streamed data set is (hfids/, tfds/, wds/); got "
            f"{num_samples} for {flags.dataset or 'a folder'}, which has {len(dataset)} images"
        )
    return dataset


def _loading(
    flags: argparse.Namespace, data: Mapping[str, Any], device: torch.device, world_size: int
) -> dict[str, Any]:
    return {
        "input_size": data["input_size"],
        "mean": data["mean"],
        "std": data["std"],
        "num_workers": flags.workers,
        "pin_memory": flags.pin_mem,
        "device": device,
        "distributed": world_size > 1,
        "use_prefetcher": not flags.no_prefetcher,
    }


def _augmentation(flags: argparse.Namespace, data: Mapping[str, Any]) -> dict[str, Any]:
    plain = flags.no_aug or not flags.train_interpolation
    own_crop = bool(flags.crop_padding or flags.shift)
    return {
        "no_aug": flags.no_aug,
        "re_prob": flags.reprob,
        "re_mode": flags.remode,
        "re_count": flags.recount,
        "train_crop_mode": flags.train_crop_mode,
        "scale": (1.0, 1.0) if own_crop else flags.scale,
        "ratio": (1.0, 1.0) if own_crop else flags.ratio,
        "hflip": flags.hflip,
        "vflip": flags.vflip,
        "color_jitter": flags.color_jitter,
        "color_jitter_prob": flags.color_jitter_prob,
        "grayscale_prob": flags.grayscale_prob,
        "gaussian_blur_prob": flags.gaussian_blur_prob,
        "auto_augment": flags.aa,
        "num_aug_repeats": flags.aug_repeats,
        "interpolation": data["interpolation"] if plain else flags.train_interpolation,
    }


def _mixup_settings(flags: argparse.Namespace, num_classes: int) -> dict[str, Any]:
    """Keywords of timm's mixup; empty without it."""
    if not (flags.mixup > 0 or flags.cutmix > 0 or flags.cutmix_minmax):
        return {}
    if flags.batch_size % 2:
        raise UserError(f"mixup and cutmix need an even --batch-size; got {flags.batch_size}")
    return {
        "mixup_alpha": flags.mixup,
        "cutmix_alpha": flags.cutmix,
        "cutmix_minmax": flags.cutmix_minmax,
        "prob": flags.mixup_prob,
        "switch_prob": flags.mixup_switch_prob,
        "mode": flags.mixup_mode,
        "label_smoothing": flags.smoothing,
        "num_classes": num_classes,
    }
