"""Weights from checkpoint files: found, read without running code, fitted to a model strictly."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from timm_structdrop.errors import UserError

_EMA_KEYS = ("state_dict_ema", "model_ema")
_WEIGHT_KEYS = ("state_dict", "model")
_PREFERRED_STEMS = ("model_best", "last")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file says: weights on the CPU, and the settings it was trained with.

    `arch` is the model's name or None, `args` the training run's flags by their argparse names
    (those of the `args.yaml` beside the file where the file holds none; empty where neither does).
    """

    path: Path
    state_dict: dict[str, Tensor]
    arch: str | None
    args: dict[str, Any]
    is_ema: bool


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that `path` means: itself, or in a training output folder `model_best`,
    else `last`. Raises `UserError` when there is none."""
    path = Path(path)
    if path.is_dir():
        for stem in _PREFERRED_STEMS:
            found = sorted(file for file in path.glob(f"{stem}.*") if file.is_file())
            if found:
                return found[0]
        raise UserError(f"a checkpoint folder must hold model_best or last; {path} holds neither")
    if not path.exists():
        raise UserError(f"checkpoint must be an existing file or folder; got {path}")
    return path


def read_file(path: str | Path, mapped: bool = False) -> dict[str, Any]:
    """Everything in a checkpoint file (`.safetensors`, or what `torch.save` wrote), on the CPU.

    With `mapped` tensors are left in the file until they are used, where its format allows it.
    Only tensors, plain Python values and the `argparse.Namespace` of timm's trainings are
    unpickled. Raises `UserError` naming the file when it is missing, truncated, not a checkpoint
    or holds anything else; `OSError` when it may not be read.
    """
    path = find_checkpoint(path)
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path, device="cpu"))
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            # torch warns about the pickle protocol of a foreign file before it gives up on it.
            warnings.simplefilter("ignore")
            content = torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=mapped and zipfile.is_zipfile(path),
            )
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise UserError(_why_not_unpickled(path)) from error
    except Exception as error:  # what a foreign file provokes has no common class
        raise UserError(_not_a_checkpoint(path)) from error
    if not isinstance(content, dict):
        raise UserError(f"a checkpoint must hold a dict of weights; {path} holds {type(content)}")
    return content


def _not_a_checkpoint(path: Path) -> str:
    size = path.stat().st_size
    return f"checkpoint must be a whole torch or safetensors file; {path} ({size} bytes) is not one"


def _why_not_unpickled(path: Path) -> str:
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return _not_a_checkpoint(path)
    return (
        "checkpoint must hold weights and plain values only, because unpickling anything else "
        f"can run code; {path} holds {', '.join(sorted(classes))}"
    )


def read_checkpoint(path: str | Path, use_ema: bool = False) -> Checkpoint:
    """Read the weights (`use_ema`: the averaged ones) and saved settings of a file or folder.

    Raises `UserError` as `read_file` does, when there are no weights in the file, and when
    `use_ema` asks for averaged weights that are not in it.
    """
    path = find_checkpoint(path)
    return checkpoint_of(read_file(path), path, use_ema)


def checkpoint_of(content: Mapping[str, Any], path: Path, use_ema: bool = False) -> Checkpoint:
    """As `read_checkpoint`, of what `read_file` has read from `path`."""
    found = next((key for key in _EMA_KEYS if content.get(key) is not None), None)
    if use_ema and found is None:
        raise UserError(f"use_ema needs a checkpoint with averaged (EMA) weights; {path} has none")
    weights_key = found if use_ema else next((key for key in _WEIGHT_KEYS if key in content), None)
    weights = content[weights_key] if weights_key else content
    if not isinstance(weights, Mapping) or not _all_tensors(weights):
        raise UserError(f"a checkpoint must hold a dict of weights; {path} holds none")
    args = _saved_args(content.get("args"), path)
    return Checkpoint(
        path=path,
        state_dict=clean_state_dict(dict(weights)),
        arch=content.get("arch") if isinstance(content.get("arch"), str) else args.get("model"),
        args=args,
        is_ema=use_ema,
    )


def _all_tensors(weights: Mapping[str, Any]) -> bool:
    return len(weights) > 0 and all(isinstance(value, Tensor) for value in weights.values())


def _saved_args(args: object, checkpoint: Path) -> dict[str, Any]:
    if isinstance(args, argparse.Namespace):
        return dict(vars(args))
    if isinstance(args, dict):
        return dict(args)
    beside = checkpoint.parent / "args.yaml"
    if not beside.is_file():
        return {}
    try:
        saved = yaml.safe_load(beside.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"args.yaml must be the YAML of a training run; got {beside}") from error
    return saved if isinstance(saved, dict) else {}


def load_weights(model: nn.Module, checkpoint: Checkpoint, name: str) -> None:
    """Load a checkpoint's weights into `model`, built under `name`, strictly and in place.

    Raises `UserError` naming both architectures and what does not fit.
    """
    try:
        model.load_state_dict(checkpoint.state_dict, strict=True)
    except RuntimeError as error:
        held = checkpoint.arch or "an unnamed architecture"
        raise UserError(
            f"the checkpoint must fit the model {name}; {checkpoint.path} holds {held}: "
            f"{_summary(str(error))}"
        ) from error


def _summary(message: str) -> str:
    """torch's list of everything that does not fit, down to counts with one example each."""
    parts = []
    for label, heading in (("missing", "Missing key"), ("not in the model", "Unexpected key")):
        line = re.search(rf"{heading}\(s\) in state_dict: (.*)", message)
        if line:
            keys = re.findall(r'"(.*?)"', line[1])
            parts.append(f"{len(keys)} {label} ({keys[0]}{', ...' if len(keys) > 1 else ''})")
    shapes = re.findall(
        r"size mismatch for (.*?): .*?shape torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", message
    )
    if shapes:
        key, held, wanted = shapes[0]
        parts.append(f"{len(shapes)} of another shape ({key}: {held} in it, {wanted} in the model)")
    return ", ".join(parts) or message
