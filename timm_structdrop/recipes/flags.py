"""The flags of train.py: timm's names and defaults, and ours.

Of timm's train.py these are left out: NaFlex and scheduled-resolution loading, knowledge
distillation, the JSD loss and augmentation splits (``--aug-splits``, ``--split-bn``,
``--resplit``), TorchScript and ``--fuser``, Weights & Biases, ``--model-dtype``, ``--tta``,
``--save-images``, ``--use-multi-epochs-loader``, ``--device-modules`` and ``--worker-seeding`` (the
data are seeded by sample). ``--local-rank`` is not needed: torchrun sets the environment.

Switches that timm can only turn on have a ``--no-`` form here, to turn off what a recipe turned on.
"""

from __future__ import annotations

import argparse

from timm.utils import ParseKwargs

from timm_structdrop.recipes.parser import FlagParser, at_least, fraction
from timm_structdrop.training import schedule_shapes

__all__ = [
    "add_data_flags",
    "add_device_flags",
    "add_model_flags",
    "add_source_flags",
    "train_parser",
]

SWITCH = argparse.BooleanOptionalAction
SCHEDULERS = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau")


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Where values come from: each source overrides the ones before it, flags override all."""
    add = parser.add_argument_group("Sources (recipe < config < flags)").add_argument
    add("--recipe", metavar="NAME", help="packaged settings; python -m timm_structdrop list")
    add("-c", "--config", metavar="FILE", help="YAML file of flags, e.g. the args.yaml of a run")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """What to read, shared by every command that reads images."""
    add = parser.add_argument_group("Data").add_argument
    add("data", nargs="?", metavar="DIR", help="folder of the data (also --data-dir)")
    add("--data-dir", metavar="DIR", help="folder of the data")
    add("--dataset", default="", metavar="NAME", help="digits, or timm's <type>/<name>")
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
        default=4,
        metavar="N",
        help="processes that read images",
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
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="key=value ...")
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


def train_parser() -> FlagParser:
    """The parser of train.py."""
    parser = FlagParser(prog="train.py", description="Train a model with structured dropout.")
    add_source_flags(parser)
    add_data_flags(parser)
    add_model_flags(parser)
    _add_training_data_flags(parser)
    _add_start_flags(parser)
    _add_regularizer_flags(parser)
    _add_optimizer_flags(parser)
    _add_scheduler_flags(parser)
    _add_augmentation_flags(parser)
    _add_loss_flags(parser)
    add_device_flags(parser)
    _add_distributed_flags(parser)
    _add_run_flags(parser)
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
        help="the same as -b if not given",
    )
    add("--train-split", default="train", metavar="NAME", help="split to train on")
    add(
        "--train-num-samples",
        type=at_least(0),
        metavar="N",
        help="samples of an iterable training split",
    )
    add("--epoch-repeats", type=float, default=0.0, metavar="N", help="repeats of iterable data")


def _add_start_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Start and continuation").add_argument
    add("--pretrained-path", metavar="FILE", help="pretrained weights, adapted to the model")
    add("--initial-checkpoint", default="", metavar="FILE", help="weights to start from")
    add(
        "--resume",
        default="",
        metavar="PATH",
        help="continue exactly: an output folder (settings from its args.yaml), or a "
        "checkpoint in it",
    )
    add("--no-resume-opt", action="store_true", help="take only the weights from --resume")
    add("--start-epoch", type=at_least(0), metavar="N", help="first epoch, whatever --resume says")
    add("--head-init-scale", type=float, metavar="X", help="scale of the classifier's start")
    add("--head-init-bias", type=float, metavar="X", help="start of the classifier's bias")


def _add_regularizer_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Structured dropout and other drop rates").add_argument
    add("--drop", type=fraction, default=0.0, metavar="P", help="dropout before the classifier")
    add("--drop-path", type=fraction, metavar="P", help="stochastic depth, timm's linear rule")
    add("--drop-block", type=float, metavar="P", help="rate of the structured layers")
    add(
        "--drop-schedule",
        choices=tuple(schedule_shapes),
        help="how the rate of the structured layers moves over training; the paper's if not given "
        "(linear for DropBlock, constant for the others)",
    )
    add(
        "--drop-schedule-start",
        type=at_least(0.0),
        default=0.0,
        metavar="EPOCH",
        help="epoch at which the drop schedule begins",
    )
    add(
        "--cluster-start",
        type=at_least(0),
        default=50,
        metavar="EPOCH",
        help="DropCluster's first fit",
    )
    add(
        "--cluster-every", type=at_least(1), default=50, metavar="N", help="epochs between its fits"
    )


def _add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Optimizer").add_argument
    add("--opt", default="sgd", metavar="NAME", help="any optimizer of timm")
    add("--opt-eps", type=float, metavar="EPS", help="the optimizer's default if not given")
    add("--opt-betas", type=float, nargs="+", metavar="BETA", help="the optimizer's default")
    add("--momentum", type=at_least(0.0), default=0.9, metavar="M", help="momentum")
    add("--weight-decay", type=at_least(0.0), default=2e-5, metavar="W", help="weight decay")
    add("--clip-grad", type=at_least(0.0), metavar="NORM", help="clip gradients; not if not given")
    add("--clip-mode", default="norm", choices=("norm", "value", "agc"), help="how to clip")
    add("--layer-decay", type=float, metavar="D", help="learning rate decay from layer to layer")
    add("--layer-decay-min-scale", type=float, default=0.0, metavar="S", help="its lower bound")
    add("--layer-decay-no-opt-scale", type=float, metavar="S", help="freeze layers below it")
    add("--opt-kwargs", nargs="*", default={}, action=ParseKwargs, help="key=value ...")
    add("--grad-accum-steps", type=at_least(1), default=1, metavar="N", help="batches per update")
    add("--grad-checkpointing", action=SWITCH, default=False, help="recompute, to save memory")
    add("--bn-momentum", type=float, metavar="M", help="momentum of batch norms that take it")
    add("--bn-eps", type=float, metavar="EPS", help="epsilon of batch norms that take it")
    add("--model-ema", action=SWITCH, default=False, help="keep and evaluate averaged weights")
    add("--model-ema-force-cpu", action=SWITCH, default=False, help="keep them on the CPU")
    add("--model-ema-decay", type=fraction, default=0.9998, metavar="D", help="their decay")
    add("--model-ema-warmup", action=SWITCH, default=False, help="begin with a smaller decay")


def _add_scheduler_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Learning rate").add_argument
    add("--epochs", type=at_least(1), default=300, metavar="N", help="epochs to train")
    add("--sched", default="cosine", choices=(*SCHEDULERS, "none"), help="learning rate schedule")
    add("--sched-on-updates", action=SWITCH, default=False, help="step per update, not per epoch")
    add("--lr", type=at_least(0.0), metavar="LR", help="learning rate; from --lr-base if not given")
    add(
        "--lr-base",
        type=at_least(0.0),
        default=0.1,
        metavar="LR",
        help="rate at --lr-base-size images",
    )
    add(
        "--lr-base-size",
        type=at_least(1),
        default=256,
        metavar="N",
        help="images per update it is for",
    )
    add(
        "--lr-base-scale", default="", choices=("", "linear", "sqrt"), help="by the optimizer if ''"
    )
    add("--lr-noise", type=float, nargs="+", metavar="PCT", help="where noise goes on and off")
    add("--lr-noise-pct", type=float, default=0.67, metavar="PCT", help="limit of the noise")
    add("--lr-noise-std", type=float, default=1.0, metavar="STD", help="deviation of the noise")
    add("--lr-cycle-mul", type=float, default=1.0, metavar="X", help="growth of the cycles")
    add("--lr-cycle-decay", type=float, default=0.5, metavar="X", help="decay of the cycles")
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
        help="epochs at which multistep decays",
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
    add("--patience-epochs", type=int, default=10, metavar="N", help="patience of plateau")
    add(
        "--decay-rate",
        "--dr",
        type=at_least(0.0),
        default=0.1,
        metavar="X",
        help="factor of each decay",
    )


def _add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
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


def _add_loss_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Loss").add_argument
    add("--smoothing", type=fraction, default=0.1, metavar="X", help="label smoothing")
    add("--bce-loss", action=SWITCH, default=False, help="binary cross-entropy")
    add("--bce-sum", action=SWITCH, default=False, help="summed over classes, not averaged")
    add("--bce-target-thresh", type=float, metavar="X", help="binarise soft targets at X")
    add("--bce-pos-weight", type=float, metavar="W", help="weight of the positives")


def _add_distributed_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Distributed training (torchrun train.py ...)").add_argument
    add("--sync-bn", action=SWITCH, default=False, help="batch norm over all processes")
    add(
        "--dist-bn",
        default="reduce",
        choices=("reduce", "broadcast", ""),
        help="how processes agree on batch norm statistics after each epoch",
    )
    add("--no-ddp-bb", action="store_true", help="do not broadcast buffers at each step")
    add("--synchronize-step", action=SWITCH, default=False, help="wait for the GPU at each step")


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Run").add_argument
    add("--seed", type=at_least(0), default=42, metavar="S", help="all randomness comes from it")
    add("--output", default="", metavar="DIR", help="where output folders go; ./output/train if ''")
    add("--experiment", default="", metavar="NAME", help="name of the output folder")
    add("--log-interval", type=at_least(1), default=50, metavar="N", help="steps between log lines")
    add(
        "--val-interval",
        type=at_least(1),
        default=1,
        metavar="N",
        help="epochs between evaluations",
    )
    add("--eval-metric", default="top1", choices=("top1", "top5", "loss"), help="what 'best' means")
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
