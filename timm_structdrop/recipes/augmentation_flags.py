"""Flags of what happens to training images on their way to the model."""

from __future__ import annotations

import argparse

from timm_structdrop.recipes.parser import at_least, fraction

__all__ = ["add_augmentation_flags"]


def add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of train.py about augmentation."""
    add = parser.add_argument_group("Augmentation").add_argument
    add("--no-aug", action="store_true", help="no augmentation, whatever the other flags say")
    add("--train-crop-mode", metavar="MODE", help="rrc, rkrc or rkrr of timm; rrc if not given")
    add(
        "--scale",
        type=float,
        nargs="+",
        default=[0.08, 1.0],
        metavar="X",
        help="least and greatest share of the image's area in the random resized crop",
    )
    add(
        "--ratio",
        type=float,
        nargs="+",
        default=[3 / 4, 4 / 3],
        metavar="X",
        help="least and greatest width over height of it",
    )
    add(
        "--crop-padding",
        type=at_least(0),
        default=0,
        metavar="N",
        help="instead of it, a random crop after padding by N pixels",
    )
    add(
        "--shift",
        type=at_least(0),
        default=0,
        metavar="N",
        help="instead of it, a random shift by up to N pixels of the original image",
    )
    add(
        "--rotation",
        type=at_least(0.0),
        default=0.0,
        metavar="DEG",
        help="random rotation by up to so many degrees",
    )
    add("--hflip", type=fraction, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--vflip", type=fraction, default=0.0, metavar="P", help="probability of a vertical flip")
    add(
        "--color-jitter",
        type=at_least(0.0),
        default=0.4,
        metavar="X",
        help="strength of colour jitter",
    )
    add("--color-jitter-prob", type=fraction, metavar="P", help="probability of colour jitter")
    add("--grayscale-prob", type=fraction, metavar="P", help="probability of turning grey")
    add("--gaussian-blur-prob", type=fraction, metavar="P", help="probability of a blur")
    add("--aa", metavar="POLICY", help="original (AutoAugment), rand-m9-mstd0.5, ... of timm")
    add(
        "--aug-repeats",
        type=float,
        default=0,
        metavar="N",
        help="times that an image is in an epoch, in distributed training",
    )
    add("--reprob", type=fraction, default=0.0, metavar="P", help="probability of random erasing")
    add(
        "--remode",
        default="pixel",
        choices=("const", "rand", "pixel"),
        help="it fills in zeros, one random colour, or random pixels",
    )
    add("--recount", type=at_least(1), default=1, metavar="N", help="regions it erases")
    add("--mixup", type=at_least(0.0), default=0.0, metavar="ALPHA", help="mixup, where above 0")
    add("--cutmix", type=at_least(0.0), default=0.0, metavar="ALPHA", help="cutmix, where above 0")
    add(
        "--cutmix-minmax",
        type=float,
        nargs="+",
        metavar="X",
        help="its least and greatest share of a side, instead of alpha",
    )
    add(
        "--mixup-prob", type=fraction, default=1.0, metavar="P", help="probability of mixing at all"
    )
    add(
        "--mixup-switch-prob",
        type=fraction,
        default=0.5,
        metavar="P",
        help="probability of cutmix where both are on",
    )
    add(
        "--mixup-mode",
        default="batch",
        choices=("batch", "pair", "elem"),
        help="what is drawn for: the batch, each pair, or each image",
    )
    add(
        "--mixup-off-epoch",
        type=at_least(0),
        default=0,
        metavar="EPOCH",
        help="no mixing from this epoch on, counted from 0; always if 0",
    )
    add(
        "--train-interpolation",
        default="random",
        metavar="NAME",
        help="how images are resized in training",
    )
