"""Evaluate one model or many: loss, top-1 and top-5, or how robust they are.

    timm-structdrop validate --recipe digits-quickstart --checkpoint output/train/<run>
    timm-structdrop validate --model "resnet18*" --data-dir /data/imagenet --results-file all.csv
    timm-structdrop validate ... --corruptions paper --severities 1-5 --plot curves.png
    timm-structdrop validate ... --attack pgd --eps 5/255 --steps 2 --step-size 1/255 --targeted
    timm-structdrop validate ... --drop-at-inference block=7,keep=0.9

The flags are timm's, and `--help` lists them with ours. In a clone it is ``python validate.py``
too.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import random_seed

from timm_structdrop.errors import UserError, is_users, one_line
from timm_structdrop.evaluation import with_dropblock, write_results
from timm_structdrop.models.weights import Checkpoint, load_weights
from timm_structdrop.recipes.build import build_model, check_has_weights
from timm_structdrop.recipes.build_datasets import check_interpolation
from timm_structdrop.recipes.build_evaluation import (
    Subject,
    check_classes,
    data_config,
    evaluation_batches,
    place_model,
    with_training_defaults,
)
from timm_structdrop.recipes.build_robustness import study
from timm_structdrop.recipes.console import log_to_terminal
from timm_structdrop.recipes.device import check_compile_backend, chosen_device, make_fast
from timm_structdrop.recipes.robustness_flags import check_robustness_flags
from timm_structdrop.recipes.validate_flags import parse_validate_flags
from timm_structdrop.words import counted

__all__ = ["main"]

_logger = logging.getLogger("timm_structdrop.validate")

# Pretrained weights of timm whose classes are not those of ImageNet-1k, as in timm's validate.py.
NOT_IMAGENET_1K = ["*_in21k", "*_in22k", "*in12k", "*_dino", "*fcmae", "*seer"]


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the flags say, and print the results."""
    flags, checkpoint, decided = parse_validate_flags(argv)
    start_logging(flags, checkpoint, decided)
    check_flags(flags)
    device = chosen_device(flags.device)
    make_fast(flags, device)
    names = None if checkpoint else matching_models(flags.model)
    if names is None:
        result: Any = validate(flags, checkpoint, device)
    else:
        result = validate_all(flags, names, device)
    save(flags, result)
    print(f"--result\n{json.dumps(result, indent=4)}")


def start_logging(
    flags: argparse.Namespace, checkpoint: Checkpoint | None, decided: Mapping[str, Any]
) -> None:
    log_to_terminal()
    if checkpoint is not None:
        kind = "averaged weights" if checkpoint.is_ema else "weights"
        _logger.info(f"Reading {kind} from {checkpoint.path}")
    if decided:
        settings = ", ".join(f"{key}={value}" for key, value in decided.items())
        _logger.info(f"From the settings of its training: {settings}")


def check_flags(flags: argparse.Namespace) -> None:
    """What would otherwise fail after the work is done, or in the middle of it."""
    if flags.amp and flags.model_dtype not in (None, "float32"):
        raise UserError(f"--amp needs --model-dtype float32; got {flags.model_dtype}")
    check_interpolation(flags.interpolation)
    check_compile_backend(flags.torchcompile)
    check_robustness_flags(flags)
    if flags.results_file:
        path = Path(flags.results_file)
        if path.is_dir():
            raise UserError(f"--results-file must be a file; got the folder {path}")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"--results-file must be in a writable folder; got {path}")


def matching_models(name: str) -> list[str] | None:
    """The pretrained models behind `all`, a wildcard or a file of names; None for a single one."""
    if name == "all":
        return timm.list_models(pretrained=True, exclude_filters=NOT_IMAGENET_1K)
    if Path(name).is_file():
        names = [line.strip() for line in Path(name).read_text().splitlines() if line.strip()]
    elif any(wildcard in name for wildcard in "*?["):
        names = timm.list_models(name, pretrained=True)
    else:
        return None
    if not names:
        raise UserError(f"--model must match pretrained models or list them; {name} names none")
    return names


def validate_all(
    flags: argparse.Namespace, names: Sequence[str], device: torch.device
) -> list[dict[str, Any]]:
    """Results of the models, best first; one that fails is named and left out."""
    if flags.plot:
        raise UserError(f"--plot draws one model; got {len(names)}")
    results: list[dict[str, Any]] = []
    for index, name in enumerate(names):
        _logger.info(f"Model {index + 1} of {len(names)}: {name}")
        one = argparse.Namespace(**{**vars(flags), "model": name})
        try:
            results.append(validate(one, None, device))
        except Exception as error:
            if not (is_users(error) or isinstance(error, torch.OutOfMemoryError)):
                raise
            _logger.error(f"{name} is left out: {one_line(error)}")
            continue
        results.sort(key=lambda result: result["top1"], reverse=True)
        save(flags, results)
    if not results:
        raise UserError(f"none of the {len(names)} models can be evaluated; the reasons are above")
    return results


def validate(
    flags: argparse.Namespace, checkpoint: Checkpoint | None, device: torch.device
) -> dict[str, Any]:
    """Build one model, evaluate it as the flags ask and return its results."""
    random_seed(flags.seed)
    model = make_model(flags, checkpoint)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    data = data_config(flags, model, checkpoint)
    loader = evaluation_batches(flags, data, device)
    check_classes(model, loader)
    note = ""
    if flags.drop_at_inference:
        note = with_dropblock(model, data["input_size"][1:])
        _logger.info(f"Dropping at inference: {note}")
    model = place_model(flags, model, device)
    shape = " x ".join(map(str, data["input_size"]))
    _logger.info(
        f"{flags.model}: {n_parameters:,} parameters on {device}, "
        f"{counted(len(loader), 'batch')} of {shape} inputs"
    )
    path = checkpoint.path if checkpoint else None
    return study(Subject(flags, model, loader, data, device, n_parameters, path, note))


def make_model(flags: argparse.Namespace, checkpoint: Checkpoint | None) -> Any:
    """The model with the checkpoint's weights, or without a checkpoint its pretrained ones."""
    name = flags.model
    if checkpoint is None and timm.is_model(name):
        check_has_weights(name, "a model must have pretrained weights or --checkpoint")
    settings = with_training_defaults(flags)
    settings.pretrained = checkpoint is None
    model = build_model(settings)
    if checkpoint is not None:
        load_weights(model, checkpoint, name)
    return model


def save(flags: argparse.Namespace, results: Any) -> None:
    if flags.results_file:
        write_results(Path(flags.results_file), results, flags.results_format)
