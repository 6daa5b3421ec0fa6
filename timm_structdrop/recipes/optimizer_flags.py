"""Flags of what training minimises and how: loss, optimizer, learning rate."""

from __future__ import annotations

import argparse

from timm_structdrop.recipes.flags import SWITCH
from timm_structdrop.recipes.parser import Keywords, at_least, fraction

__all__ = ["add_loss_flags", "add_optimizer_flags", "add_scheduler_flags"]

SCHEDULERS = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau")


def add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of train.py about the optimizer."""
    add = parser.add_argument_group("Optimizer").add_argument
    add("--opt", default="sgd", metavar="NAME", help="any optimizer of timm")
    add("--opt-eps", type=float, metavar="EPS", help="epsilon; the optimizer's if not given")
    add(
        "--opt-betas",
        type=float,
        nargs="+",
        metavar="BETA",
        help="betas; the optimizer's if not given",
    )
    add("--momentum", type=at_least(0.0), default=0.9, metavar="M", help="of sgd and the like")
    add(
        "--weight-decay",
        type=at_least(0.0),
        default=2e-5,
        metavar="W",
        help="not on biases and norms",
    )
    add("--clip-grad", type=at_least(0.0), metavar="X", help="clip gradients; not if not given")
    add(
        "--clip-mode",
        default="norm",
        choices=("norm", "value", "agc"),
        help="clip the norm of all gradients, each value, or adaptively by the weights' norms",
    )
    add(
        "--layer-decay",
        type=float,
        metavar="D",
        help="factor on the learning rate from each layer to the one before it",
    )
    add("--layer-decay-min-scale", type=float, default=0.0, metavar="S", help="its lower bound")
    add("--layer-decay-no-opt-scale", type=float, metavar="S", help="layers below it are frozen")
    add(
        "--opt-kwargs",
        nargs="*",
        default={},
        action=Keywords,
        metavar="KEY=VALUE",
        help="more settings of the optimizer",
    )
    add("--grad-accum-steps", type=at_least(1), default=1, metavar="N", help="batches per update")
    add("--grad-checkpointing", action=SWITCH, default=False, help="recompute, to save memory")
    add = parser.add_argument_group("Averaged weights").add_argument
    add("--model-ema", action=SWITCH, default=False, help="keep them, and evaluate them too")
    add(
        "--model-ema-decay",
        type=fraction,
        default=0.9998,
        metavar="D",
        help="share of the average that an update leaves",
    )
    add("--model-ema-warmup", action=SWITCH, default=False, help="begin with a smaller share")
    add(
        "--model-ema-force-cpu",
        action=SWITCH,
        default=False,
        help="keep them on the CPU; beside a model on a GPU they are not evaluated",
    )


def add_scheduler_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of train.py about the learning rate and its schedule."""
    add = parser.add_argument_group("Learning rate").add_argument
    add("--epochs", type=at_least(1), default=300, metavar="N", help="epochs to train")
    add("--sched", default="cosine", choices=(*SCHEDULERS, "none"), help="how it moves")
    add("--sched-on-updates", action=SWITCH, default=False, help="it moves at each update")
    add("--lr", type=at_least(0.0), metavar="LR", help="the rate; from --lr-base if not given")
    add(
        "--lr-base",
        type=at_least(0.0),
        default=0.1,
        metavar="LR",
        help="the rate for updates of --lr-base-size images; scaled to those of this run",
    )
    add(
        "--lr-base-size",
        type=at_least(1),
        default=256,
        metavar="N",
        help="images in an update that it is for",
    )
    add(
        "--lr-base-scale",
        default="",
        choices=("", "linear", "sqrt"),
        metavar="RULE",
        help="linear or sqrt in the images of an update; by the optimizer if not given",
    )
    add(
        "--lr-noise",
        type=float,
        nargs="+",
        metavar="X",
        help="noise on the rate, from this share of the epochs on (and up to that one)",
    )
    add("--lr-noise-pct", type=float, default=0.67, metavar="X", help="limit of the noise")
    add("--lr-noise-std", type=float, default=1.0, metavar="STD", help="deviation of the noise")
    add("--lr-cycle-mul", type=float, default=1.0, metavar="X", help="growth of a cycle's length")
    add("--lr-cycle-decay", type=float, default=0.5, metavar="X", help="decay of a cycle's rate")
    add("--lr-cycle-limit", type=at_least(1), default=1, metavar="N", help="number of cycles")
    add("--lr-k-decay", type=float, default=1.0, metavar="K", help="k-decay of cosine and poly")
    add(
        "--warmup-lr", type=at_least(0.0), default=1e-5, metavar="LR", help="rate at the very start"
    )
    add("--min-lr", type=at_least(0.0), default=0.0, metavar="LR", help="lower bound of the rate")
    add(
        "--decay-milestones",
        type=int,
        nargs="+",
        default=[90, 180, 270],
        metavar="EPOCH",
        help="epochs at which multistep decays, counted from 0",
    )
    add("--decay-epochs", type=float, default=90, metavar="N", help="epochs between step's decays")
    add("--warmup-epochs", type=at_least(0), default=5, metavar="N", help="epochs of warm-up")
    add("--warmup-prefix", action=SWITCH, default=False, help="warm-up comes before --epochs")
    add(
        "--cooldown-epochs",
        type=at_least(0),
        default=0,
        metavar="N",
        help="epochs at --min-lr at the end",
    )
    add(
        "--patience-epochs",
        type=int,
        default=10,
        metavar="N",
        help="epochs without a gain that plateau waits for",
    )
    add(
        "--decay-rate",
        "--dr",
        type=at_least(0.0),
        default=0.1,
        metavar="X",
        help="factor of each decay",
    )


def add_loss_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of train.py about the loss."""
    add = parser.add_argument_group("Loss").add_argument
    add("--smoothing", type=fraction, default=0.1, metavar="X", help="label smoothing, in [0, 1]")
    add("--bce-loss", action=SWITCH, default=False, help="binary cross-entropy")
    add("--bce-sum", action=SWITCH, default=False, help="sum it over classes")
    add("--bce-target-thresh", type=float, metavar="X", help="binarise soft targets at X")
    add("--bce-pos-weight", type=float, metavar="W", help="weight of the positives")
