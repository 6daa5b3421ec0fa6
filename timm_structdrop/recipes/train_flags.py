"""The flags of train.py: timm's names and defaults, and ours.

Of timm's train.py these are left out: NaFlex and scheduled-resolution loading, knowledge
distillation, the JSD loss and augmentation splits (``--aug-splits``, ``--split-bn``,
``--resplit``), TorchScript and ``--fuser``, Weights & Biases, ``--model-dtype``, ``--tta``,
``--save-images``, ``--use-multi-epochs-loader``, ``--device-modules`` and ``--worker-seeding`` (the
data are seeded by sample). ``--local-rank`` is not needed: torchrun sets the environment.
"""

from __future__ import annotations

import argparse

from timm_structdrop.recipes.augmentation_flags import add_augmentation_flags
from timm_structdrop.recipes.flags import (
    SWITCH,
    add_data_flags,
    add_device_flags,
    add_drop_block_flag,
    add_model_flags,
    add_source_flags,
)
from timm_structdrop.recipes.optimizer_flags import (
    add_loss_flags,
    add_optimizer_flags,
    add_scheduler_flags,
)
from timm_structdrop.recipes.parser import FlagParser, at_least, fraction, share
from timm_structdrop.training import schedule_shapes

__all__ = ["train_parser"]


def train_parser() -> FlagParser:
    """The parser of train.py."""
    parser = FlagParser(prog="train.py", description="Train a model with structured dropout.")
    add_source_flags(parser)
    add_data_flags(parser)
    _add_training_data_flags(parser)
    add_model_flags(parser)
    _add_regularizer_flags(parser)
    _add_start_flags(parser)
    add_optimizer_flags(parser)
    add_scheduler_flags(parser)
    add_augmentation_flags(parser)
    add_loss_flags(parser)
    add_device_flags(parser)
    _add_distributed_flags(parser)
    _add_run_flags(parser)
    _add_hub_flags(parser)
    return parser


def _add_training_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Training data").add_argument
    add(
        "-b",
        "--batch-size",
        type=at_least(1),
        default=128,
        metavar="N",
        help="images per process and step",
    )
    add(
        "-vb",
        "--validation-batch-size",
        type=at_least(1),
        metavar="N",
        help="images per process at evaluation; as -b if not given",
    )
    add("--train-split", default="train", metavar="NAME", help="split to train on")
    add(
        "--train-num-samples",
        type=at_least(1),
        metavar="N",
        help="images in the training split of a streamed data set (hfids/, tfds/, wds/)",
    )
    add(
        "--train-fraction",
        type=share,
        metavar="F",
        help="train on this share of every class, in (0, 1]; on all if not given",
    )
    add(
        "--train-fraction-seed",
        type=at_least(0),
        metavar="S",
        help="of the share; a larger one holds the smaller ones of its seed; --seed if not given",
    )
    add(
        "--epoch-repeats",
        type=float,
        default=0.0,
        metavar="N",
        help="times that a streamed data set is read in an epoch; once if 0",
    )


def _add_start_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Start and continuation").add_argument
    add("--pretrained-path", metavar="FILE", help="weights, adapted to the classes and channels")
    add("--initial-checkpoint", default="", metavar="FILE", help="weights that fit as they are")
    add(
        "--resume",
        default="",
        metavar="PATH",
        help="continue exactly: an output folder (settings from its args.yaml), or a "
        "checkpoint in it",
    )
    add("--no-resume-opt", action="store_true", help="take only the weights from --resume")
    add(
        "--start-epoch",
        type=at_least(0),
        metavar="N",
        help="first epoch, counted from 0, whatever --resume says",
    )
    add(
        "--head-init-scale",
        type=float,
        metavar="X",
        help="factor on the classifier's first weights",
    )
    add("--head-init-bias", type=float, metavar="X", help="first value of the classifier's bias")


def _add_regularizer_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Structured dropout and other drop rates").add_argument
    add(
        "--drop", type=fraction, default=0.0, metavar="P", help="dropout rate before the classifier"
    )
    add("--drop-path", type=fraction, metavar="P", help="stochastic depth, by timm's linear rule")
    add_drop_block_flag(add)
    add(
        "--drop-schedule",
        choices=tuple(schedule_shapes),
        help="how that rate moves over training: up to its target (linear, cosine; delayed: all "
        "at once), from the target to 0 (inverse), to 0 half-way and back (v); the paper's if "
        "not given (linear for DropBlock, constant for the others)",
    )
    add(
        "--drop-schedule-start",
        type=at_least(0.0),
        default=0.0,
        metavar="EPOCH",
        help="epoch at which it begins, counted from 0",
    )
    add(
        "--cluster-start",
        type=at_least(0),
        default=50,
        metavar="EPOCH",
        help="epoch of DropCluster's first fit, counted from 0",
    )
    add("--cluster-every", type=at_least(1), default=50, metavar="N", help="epochs from fit to fit")
    add(
        "--rblock-temperature",
        type=at_least(0.0),
        default=3.0,
        metavar="T",
        help="temperature of R-Block's mutual loss, above 0",
    )
    add(
        "--rblock-alpha",
        type=fraction,
        default=0.1,
        metavar="A",
        help="weight of R-Block's mutual loss; the cross-entropy has the rest",
    )


def _add_distributed_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Distributed training (torchrun train.py ...)").add_argument
    add("--sync-bn", action=SWITCH, default=False, help="batch norm over all processes")
    add(
        "--dist-bn",
        default="reduce",
        choices=("reduce", "broadcast", ""),
        metavar="HOW",
        help="how processes agree on batch norm statistics after each epoch: reduce, broadcast or "
        "'' for not at all",
    )
    add("--no-ddp-bb", action="store_true", help="do not broadcast buffers at each step")
    add("--synchronize-step", action=SWITCH, default=False, help="wait for the GPU at each step")


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Run").add_argument
    add("--seed", type=at_least(0), default=42, metavar="S", help="all randomness comes from it")
    add(
        "--output",
        default="",
        metavar="DIR",
        help="where output folders go; output/train if not given",
    )
    add(
        "--experiment",
        default="",
        metavar="NAME",
        help="name of the run's folder there; time, model and size if not given",
    )
    add(
        "--log-interval",
        type=at_least(1),
        default=50,
        metavar="N",
        help="batches between log lines, where they are no terminal's",
    )
    add(
        "--val-interval",
        type=at_least(1),
        default=1,
        metavar="N",
        help="epochs between evaluations",
    )
    add(
        "--eval-metric",
        default="top1",
        choices=("top1", "top5", "loss"),
        help="ranks the checkpoints; without an evaluation it is the training loss",
    )
    add(
        "--checkpoint-hist",
        type=at_least(1),
        default=10,
        metavar="N",
        help="best checkpoints to keep",
    )
    add(
        "--recovery-interval",
        type=at_least(0),
        default=0,
        metavar="N",
        help="updates between recovery checkpoints; none if 0",
    )


def _add_hub_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Hugging Face Hub").add_argument
    add("--push-to-hub", default="", metavar="REPO", help="push the best checkpoint: user/name")
    add(
        "--push-every",
        type=at_least(0),
        default=0,
        metavar="N",
        help="epochs between pushes; only at the end if 0",
    )
    add(
        "--hub-license",
        default="",
        metavar="ID",
        help="of the weights, such as apache-2.0; needed to push",
    )
    add("--hub-private", action=SWITCH, default=False, help="make a private repository")
