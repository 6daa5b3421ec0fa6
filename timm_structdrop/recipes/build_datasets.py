"""Input settings and data sets from flags."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from PIL import ImageMode
from timm.data import create_transform, resolve_data_config
from torch.utils.data import IterableDataset

from timm_structdrop.data import create_dataset
from timm_structdrop.errors import UserError, nearest
from timm_structdrop.words import counted

__all__ = [
    "build_dataset",
    "check_interpolation",
    "data_config",
    "input_settings",
    "normalised_images",
]

INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "box", "hamming", "lanczos")


def input_settings(flags: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Input size, normalisation and resizing: what the flags say, else what the model says.

    Raises:
        UserError: the mean, the deviation or the interpolation is not one that fits.
    """
    check_interpolation(flags.interpolation)
    if flags.train_interpolation != "random":
        check_interpolation(flags.train_interpolation)
    return data_config(flags, model)


def data_config(
    flags: argparse.Namespace, model: Any, use_test_size: bool = False
) -> dict[str, Any]:
    """timm's data config with the model's channels, where timm takes three for granted.

    Mean and deviation of a model for another number of channels are averaged.

    Args:
        flags: those that timm reads: ``input_size``, ``mean``, ...
        model: made by ``timm.create_model``.
        use_test_size: the size and the crop that timm tests the model with.

    Raises:
        UserError: the mean or the deviation of the flags does not fit the channels.
    """
    channels = _channels(flags, model)
    for name in ("mean", "std"):
        values = getattr(flags, name)
        if values is not None and len(values) not in (1, channels):
            raise UserError(f"--{name} must be one value or {channels}; got {len(values)}")
    settings = {**vars(flags), "in_chans": channels}
    data: dict[str, Any] = resolve_data_config(settings, model=model, use_test_size=use_test_size)
    data["input_size"] = (channels, *data["input_size"][1:])
    for name in ("mean", "std"):
        if len(data[name]) != channels:
            data[name] = (sum(data[name]) / len(data[name]),) * channels
    return data


def _channels(flags: argparse.Namespace, model: Any) -> int:
    """The channels of the model's images: those of the flags, of the arguments that the model was
    made with, or of its cfg."""
    if flags.input_size:
        return int(flags.input_size[0])
    made_with = getattr(model, "_model_args", {}).get("in_chans")
    return int(flags.in_chans or made_with or model.pretrained_cfg["input_size"][0])


def check_interpolation(name: str) -> None:
    """Raise UserError for a way of resizing that timm does not have; '' stands for the model's."""
    if name and name not in INTERPOLATIONS:
        raise UserError(f"unknown interpolation {name!r}{nearest(name, INTERPOLATIONS)}")


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
    """The mode of the flags, else RGB for three channels and L for others.

    Raises:
        UserError: there is no such mode, or its channels are not the model's.
    """
    channels = data["input_size"][0]
    mode: str = flags.input_img_mode or ("RGB" if channels == 3 else "L")
    try:
        bands = len(ImageMode.getmode(mode).bands)
    except KeyError as error:
        raise UserError(
            f"--input-img-mode must be a mode of PIL, such as L, RGB or RGBA; got {mode!r}"
        ) from error
    if bands != channels:
        raise UserError(
            f"the model must take the {counted(bands, 'channel')} of {mode} images (--in-chans, "
            f"--input-img-mode); got {channels}"
        )
    return mode


def build_dataset(flags: argparse.Namespace, data: Mapping[str, Any], is_training: bool) -> Any:
    """The data set that is trained on, or the evaluated one, without the loader's transforms.

    Args:
        flags: those of train.py.
        data: timm's data config.
        is_training: which of the two.

    Raises:
        UserError: the data are not there, or the flags do not fit them.
    """
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
