"""Loaders, and the evaluation between epochs, from flags."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import FastCollateMixup, Mixup, create_loader
from torch import nn
from torch.utils.data import IterableDataset

from timm_structdrop.data import SeededDataset, class_names
from timm_structdrop.data.factory import FOLDER_NAMES, has_splits
from timm_structdrop.errors import UserError
from timm_structdrop.evaluation import evaluate
from timm_structdrop.recipes.build_datasets import build_dataset
from timm_structdrop.training import Progress

__all__ = ["evaluation", "training_batches", "validation_batches"]

_logger = logging.getLogger(__name__)


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
    dataset = build_dataset(flags, data, is_training=True)
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
    dataset = build_dataset(flags, data, is_training=False)
    return create_loader(
        dataset if wrap is None else wrap(dataset),
        batch_size=flags.validation_batch_size or flags.batch_size,
        is_training=False,
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
        crop_mode=data["crop_mode"],
        **_loading(flags, data, device, world_size),
    )


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
