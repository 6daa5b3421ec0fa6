"""Flags of what happens to training images on their way to the model."""

from __future__ import annotations

import argparse

from timm_structdrop.recipes.parser import at_least, fraction

__all__ = ["add_augmentation_flags"]


def add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Augmentation").add_argument
    add("--no-aug", action="store_true", help="no augmentation, whatever the other flags say")
    add("--train-crop-mode", metavar="MODE", help="rrc, rkrc or rkrr; rrc if not given")
    add("--scale", type=float, nargs="+", default=[0.08, 1.0], metavar="PCT", help="crop's area")
    add("--ratio", type=float, nargs="+", default=[3 / 4, 4 / 3], metavar="R", help="crop's aspect")
    add(
        "--crop-padding",
        type=at_least(0),
        default=0,
        metavar="N",
        help="random crop after padding by N pixels, instead of the random resized crop",
    )
    add(
        "--shift",
        type=at_least(0),
        default=0,
        metavar="N",
        help="random shift by up to N pixels of the original image, instead of it",
    )
    add(
        "--rotation",
        type=at_least(0.0),
        default=0.0,
        metavar="DEG",
        help="random rotation by up to DEG",
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
    add("--aa", metavar="POLICY", help="AutoAugment, RandAugment, ... as timm writes them")
    add("--aug-repeats", type=float, default=0, metavar="N", help="repeats (distributed only)")
    add("--reprob", type=fraction, default=0.0, metavar="P", help="probability of random erasing")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="what it fills in")
    add("--recount", type=at_least(1), default=1, metavar="N", help="regions it erases")
    add("--mixup", type=at_least(0.0), default=0.0, metavar="ALPHA", help="mixup, on above 0")
    add("--cutmix", type=at_least(0.0), default=0.0, metavar="ALPHA", help="cutmix, on above 0")
    add("--cutmix-minmax", type=float, nargs="+", metavar="X", help="its area, instead of alpha")
    add(
        "--mixup-prob", type=fraction, default=1.0, metavar="P", help="probability of mixing at all"
    )
    add(
        "--mixup-switch-prob",
        type=fraction,
        default=0.5,
        metavar="P",
        help="of cutmix when both are on",
    )
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="drawn per what")
    add(
        "--mixup-off-epoch",
        type=at_least(0),
        default=0,
        metavar="EPOCH",
        help="no mixing from here on",
    )
    add("--train-interpolation", default="random", metavar="NAME", help="resizing in training")
