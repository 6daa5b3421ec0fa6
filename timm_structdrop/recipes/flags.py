"""Flags that several commands share: where values come from, the data, the model, the device.

Names and defaults are timm's where timm has them. Switches that timm can only turn on have a
``--no-`` form here, to turn off what a recipe turned on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from timm_structdrop.recipes.parser import Keywords, at_least, fraction, rate

__all__ = [
    "SWITCH",
    "add_data_flags",
    "add_device_flags",
    "add_drop_block_flag",
    "add_model_flags",
    "add_settings_flags",
    "add_source_flags",
]

SWITCH = argparse.BooleanOptionalAction


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Where values come from: each source overrides the ones before it, flags override all."""
    add = parser.add_argument_group("Sources of values: recipe < config < flags").add_argument
    add(
        "--recipe",
        metavar="NAME",
        help="packaged settings; python -m timm_structdrop list --recipes prints them",
    )
    add("-c", "--config", metavar="FILE", help="YAML file of flags, such as the args.yaml of a run")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """What to read, shared by every command that reads images."""
    add = parser.add_argument_group("Data").add_argument
    add("data", nargs="?", metavar="DIR", help="folder of the data; the same as --data-dir")
    add(
        "--data-dir",
        metavar="DIR",
        help="folder of the data: train/ and validation/ with a folder of images for each class",
    )
    add(
        "--dataset",
        default="",
        metavar="NAME",
        help="digits, tiny_imagenet, or timm's <type>/<name>; a folder of images if not given",
    )
    add("--val-split", default="validation", metavar="NAME", help="evaluated split; '' for none")
    add(
        "-j",
        "--workers",
        type=at_least(0),
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that read images; timm's 4, or as many as there are cores",
    )
    add("--no-prefetcher", action="store_true", help="normalise on the CPU, without prefetching")
    add("--pin-mem", action=SWITCH, default=False, help="pin memory for the way to the GPU")
    add("--class-map", default="", metavar="FILE", help="text file with a class in each line")
    add(
        "--input-img-mode",
        metavar="MODE",
        help="PIL mode of the images; RGB for 3 channels, else L, if not given",
    )
    add("--input-key", metavar="KEY", help="key of the image in records of hfds/, tfds/ and wds/")
    add("--target-key", metavar="KEY", help="key of the label in them")
    add(
        "--val-num-samples",
        type=at_least(1),
        metavar="N",
        help="images in the evaluated split of a streamed data set (hfids/, tfds/, wds/)",
    )
    add("--dataset-download", action=SWITCH, default=False, help="let torch/ and tfds/ download")
    add(
        "--dataset-trust-remote-code",
        action=SWITCH,
        default=False,
        help="let hfds/ data sets run code of their own",
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, and the shape of its input."""
    add = parser.add_argument_group("Model").add_argument
    add("--model", default="resnet50", metavar="NAME", help="any model of timm or of this package")
    add("--pretrained", action=SWITCH, default=False, help="start from the pretrained weights")
    add_settings_flags(add)
    add("--gp", metavar="POOL", help="global pool: fast, avg, max, avgmax or catavgmax")
    add = parser.add_argument_group("Input of the model; its own values if not given").add_argument
    add("--img-size", type=at_least(1), metavar="N", help="height and width in pixels")
    add("--in-chans", type=at_least(1), metavar="N", help="channels of the images")
    add(
        "--input-size",
        nargs=3,
        type=at_least(1),
        metavar="N",
        help="channels, height and width, instead of these two",
    )
    add("--mean", type=float, nargs="+", metavar="X", help="of the pixels, which are in [0, 1]")
    add("--std", type=float, nargs="+", metavar="X", help="standard deviation of the pixels")
    add("--crop-pct", type=fraction, metavar="X", help="share of the image's side in the crop")
    add("--interpolation", default="", metavar="NAME", help="how images are resized at evaluation")


def add_settings_flags(add: Callable[..., argparse.Action]) -> None:
    """What a model is built with, shared by every command that builds one.

    Args:
        add: ``add_argument`` of their group.
    """
    add(
        "--num-classes",
        type=at_least(1),
        metavar="N",
        help="outputs of the model; its default if not given",
    )
    add(
        "--model-kwargs",
        nargs="*",
        default={},
        action=Keywords,
        metavar="KEY=VALUE",
        help="settings of the model and its regularizer, such as n_clusters=15",
    )
    add(
        "--structdrop",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        help="attach a regularizer to the model; may be repeated",
    )
    add("--bn-momentum", type=float, metavar="M", help="momentum of batch norms that take it")
    add("--bn-eps", type=float, metavar="EPS", help="epsilon of batch norms that take it")


def add_drop_block_flag(add: Callable[..., argparse.Action]) -> None:
    """The rate of a model's structured layers; ``add`` as for :func:`add_settings_flags`."""
    add(
        "--drop-block",
        type=rate,
        metavar="P",
        help="drop rate of the structured layers, in [0, 1); the model's default if not given",
    )


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Where to compute, how precisely and how fast."""
    add = parser.add_argument_group("Device and speed").add_argument
    add(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; cuda where there is one, else cpu"
    )
    add("--amp", action=SWITCH, default=False, help="automatic mixed precision")
    add("--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="its low precision")
    add("--channels-last", action=SWITCH, default=False, help="channels_last memory format")
    add("--fast-norm", action=SWITCH, default=False, help="low-precision normalisation layers")
    add(
        "--torchcompile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="torch.compile; with inductor if no backend is named",
    )
    add("--torchcompile-mode", metavar="MODE", help="mode of torch.compile")
