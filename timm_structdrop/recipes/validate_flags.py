"""The flags of validate.py: timm's names, and where their values come from.

Of timm's validate.py these are left out: NaFlex loading, TorchScript and AOT Autograd, ``--fuser``,
``--reparam``, ``--test-pool``, ``--tf-preprocessing``, ``--num-gpu``, ``--retry``,
``--crop-border-pixels``, ``--real-labels``, ``--valid-labels`` and ``--metrics-avg``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from timm_structdrop.models.weights import Checkpoint, read_checkpoint
from timm_structdrop.recipes.flags import (
    add_data_flags,
    add_device_flags,
    add_model_flags,
    add_source_flags,
)
from timm_structdrop.recipes.parser import FlagParser, at_least
from timm_structdrop.recipes.robustness_flags import add_robustness_flags
from timm_structdrop.recipes.sources import parse_with_sources

__all__ = ["parse_validate_flags", "validate_parser"]

# What the settings of a checkpoint's training decide, unless they are given.
INPUT_KEYS = (
    "img_size",
    "in_chans",
    "input_size",
    "num_classes",
    "mean",
    "std",
    "crop_pct",
    "interpolation",
    "input_img_mode",
    "dataset",
    "class_map",
)
ARCHITECTURE_KEYS = ("model", "gp", "model_kwargs", "structdrop", "bn_momentum", "bn_eps")


def validate_parser() -> FlagParser:
    """The parser of validate.py."""
    parser = FlagParser(prog="validate.py", description="Evaluate models with timm's flags.")
    add_source_flags(parser)
    add_data_flags(parser)
    add_model_flags(parser)
    add_device_flags(parser)
    _add_evaluation_flags(parser)
    add_robustness_flags(parser)
    _add_result_flags(parser)
    return parser


def _add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Evaluation").add_argument
    add(
        "-m",
        dest="model",
        metavar="NAME",
        help="as --model; both also take a wildcard, 'all', and a file with a name in each line",
    )
    add("--split", dest="val_split", metavar="NAME", help="as --val-split")
    add(
        "--num-samples",
        dest="val_num_samples",
        type=at_least(1),
        metavar="N",
        help="as --val-num-samples",
    )
    add(
        "--checkpoint",
        default="",
        metavar="PATH",
        help="weights: a file, or the folder of a run; the pretrained ones if not given",
    )
    add("--use-ema", action="store_true", help="the averaged weights of the checkpoint")
    add("-b", "--batch-size", type=at_least(1), default=256, metavar="N", help="images per step")
    add(
        "--use-train-size",
        action="store_true",
        help="pretrained weights at the image size of their training, not of their test",
    )
    add(
        "--crop-mode",
        choices=("squash", "border", "center"),
        help="how images become square; the model's if not given",
    )
    add(
        "--model-dtype",
        choices=("float32", "float16", "bfloat16"),
        help="precision of weights and images, without --amp",
    )
    add("--seed", type=at_least(0), default=42, metavar="S", help="all randomness comes from it")


def _add_result_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Results").add_argument
    add("--results-file", default="", metavar="FILE", help="file that results are written to")
    add("--results-format", default="csv", choices=("csv", "json"), help="format of that file")
    add(
        "--log-freq",
        type=at_least(1),
        default=10,
        metavar="N",
        help="batches between log lines, where they are no terminal's",
    )


def parse_validate_flags(
    argv: Sequence[str] | None = None,
) -> tuple[argparse.Namespace, Checkpoint | None, dict[str, Any]]:
    """The flags, the checkpoint they name, and which flags its training's settings decided.

    Over the defaults stand the settings that a checkpoint was trained with (model, input, data
    set), then the recipe, the config and the command line.

    Raises:
        UserError: a flag, a recipe, the config or the checkpoint is not right.
    """
    flags = _parse_over({}, (), argv)
    if not flags.checkpoint:
        return flags, None, {}
    checkpoint = read_checkpoint(flags.checkpoint, flags.use_ema)
    saved = {key: value for key, value in checkpoint.args.items() if value is not None}
    saved["model"] = checkpoint.arch or flags.model
    informed = _parse_over(saved, (*INPUT_KEYS, *ARCHITECTURE_KEYS), argv)
    if informed.model != saved["model"]:  # another one is asked for, which has its own settings
        informed = _parse_over(saved, INPUT_KEYS, argv)
    before = vars(flags)
    decided = {key: value for key, value in vars(informed).items() if value != before[key]}
    return informed, checkpoint, decided


def _parse_over(
    saved: Mapping[str, Any], keys: Sequence[str], argv: Sequence[str] | None
) -> argparse.Namespace:
    parser = validate_parser()
    parser.set_defaults(**{key: saved[key] for key in keys if key in saved})
    flags = parse_with_sources(parser, argv)
    flags.val_split = flags.val_split or "validation"  # a recipe can say '' to not evaluate
    return flags
