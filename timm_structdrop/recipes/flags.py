"""Flags that several commands share: where values come from, the data, the model, the device.

Names and defaults are timm's where timm has them. Switches that timm can only turn on have a
``--no-`` form here, to turn off what a recipe turned on.
"""

from __future__ import annotations

import argparse
import os

from timm_structdrop.recipes.parser import Keywords, at_least, fraction

__all__ = ["SWITCH", "add_data_flags", "add_device_flags", "add_model_flags", "add_source_flags"]

SWITCH = argparse.BooleanOptionalAction


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Where values come from: each source overrides the ones before it, flags override all."""
    add = parser.add_argument_group("Sources (recipe < config < flags)").add_argument
    add(
        "--recipe",
        metavar="NAME",
        help="packaged settings; python -m timm_structdrop list --recipes",
    )
    add("-c", "--config", metavar="FILE", help="YAML file of flags, e.g. the args.yaml of a run")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """What to read, shared by every command that reads images."""
    add = parser.add_argument_group("Data").add_argument
    add("data", nargs="?", metavar="DIR", help="folder of the data (also --data-dir)")
    add("--data-dir", metavar="DIR", help="folder of the data")
    add(
        "--dataset",
        default="",
        metavar="NAME",
        help="digits, tiny_imagenet, or timm's <type>/<name>",
    )
    add("--val-split", default="validation", metavar="NAME", help="evaluated split; '' for none")
    add("--dataset-download", action=SWITCH, default=False, help="let torch/ and tfds/ download")
    add("--class-map", default="", metavar="FILE", help="mapping of classes to indices")
    add("--input-img-mode", metavar="MODE", help="PIL mode of the images: RGB, L")
    add("--input-key", metavar="KEY", help="key of the image in the data set's records")
    add("--target-key", metavar="KEY", help="key of the label in the data set's records")
    add(
        "--val-num-samples",
        type=at_least(0),
        metavar="N",
        help="samples of an iterable evaluated split",
    )
    add("--dataset-trust-remote-code", action=SWITCH, default=False, help="for hfds/ data sets")
    add(
        "-j",
        "--workers",
        type=at_least(0),
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that read images; timm's 4, or as many as there are cores",
    )
    add("--pin-mem", action=SWITCH, default=False, help="pin memory for the way to the GPU")
    add("--no-prefetcher", action="store_true", help="normalise on the CPU, without prefetching")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, and the shape of its input."""
    add = parser.add_argument_group("Model").add_argument
    add("--model", default="resnet50", metavar="NAME", help="any model of timm or of this package")
    add("--pretrained", action=SWITCH, default=False, help="start from the pretrained weights")
    add(
        "--num-classes",
        type=at_least(1),
        metavar="N",
        help="labels; the model's default if not given",
    )
    add("--gp", metavar="POOL", help="global pool: fast, avg, max, avgmax or catavgmax")
    add(
        "--img-size",
        type=at_least(1),
        metavar="N",
        help="image size; the model's default if not given",
    )
    add("--in-chans", type=at_least(1), metavar="N", help="image channels; 3 if not given")
    add("--input-size", nargs=3, type=int, metavar="N", help="channels, height and width")
    add("--crop-pct", type=fraction, metavar="PCT", help="central crop at evaluation")
    add("--mean", type=float, nargs="+", metavar="MEAN", help="pixel mean, in [0, 1]")
    add("--std", type=float, nargs="+", metavar="STD", help="pixel standard deviation")
    add("--interpolation", default="", metavar="NAME", help="resizing at evaluation")
    add("--model-kwargs", nargs="*", default={}, action=Keywords, help="key=value ...")
    add(
        "--structdrop",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        help="attach a regularizer to the model; may be repeated",
    )
    add("--channels-last", action=SWITCH, default=False, help="channels_last memory format")
    add("--fast-norm", action=SWITCH, default=False, help="low-precision normalisation layers")
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile")
    add("--torchcompile-mode", metavar="MODE", help="mode of torch.compile")


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Where to compute and how precisely."""
    add = parser.add_argument_group("Device").add_argument
    add(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; cuda where there is one, else cpu"
    )
    add("--amp", action=SWITCH, default=False, help="automatic mixed precision")
    add("--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="its low precision")
