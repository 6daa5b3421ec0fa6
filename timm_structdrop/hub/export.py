"""A model as a folder in timm's Hub format that brings back its weights and all its settings."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

from timm_structdrop.errors import UserError, one_line
from timm_structdrop.files import save_json
from timm_structdrop.models.placement import structdrop_layers
from timm_structdrop.models.structdrop_variants import variants

__all__ = ["CONFIG", "WEIGHTS", "export_model", "file_sha256", "layer_settings", "shared_rate"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def export_model(
    model: nn.Module,
    folder: Path,
    *,
    data_config: Mapping[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
) -> str:
    """Write ``config.json`` and ``model.safetensors`` of a model, whole or not at all.

    ``timm.create_model("local-dir:<folder>", pretrained=True)`` gives the model back: weights,
    clusters, and settings including the drop rates, which timm's own exports leave out. The config
    holds the SHA-256 of the weights under ``sha256``.

    Args:
        model: made by ``timm.create_model``, with or without attached regularizers; it stays as
            it is.
        folder: not there yet, or empty.
        data_config: timm's data config of the images it was trained on.
        label_names: names of the classes, by index.

    Returns:
        The SHA-256 of the weights.

    Raises:
        UserError: timm cannot rebuild the model from what it records of it, there are not as many
            labels as classes, or the folder cannot be written; nothing is left of it then.
    """
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not config.get("architecture"):
        raise UserError(
            f"a model must be made by timm.create_model to be exported; got {type(model).__name__}"
        )
    if label_names is not None and len(label_names) != model.num_classes:
        raise UserError(
            f"label_names must have a name for each of the {model.num_classes} classes; "
            f"got {len(label_names)}"
        )
    temporary = folder.absolute().with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        sha256 = _write(model, temporary, data_config, label_names)
        _check(model, temporary)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sha256


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def layer_settings(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Name and settings of every regularizer of a model, in its order."""
    return [(layer.regularizer, layer.settings()) for layer in structdrop_layers(model)]


def shared_rate(model: nn.Module, regularizer: str | None = None) -> float | None:
    """The target rate that all layers of a regularizer have, or of all; None where they differ."""
    rates = {
        layer.target_drop_prob
        for layer in structdrop_layers(model)
        if regularizer in (None, layer.regularizer)
    }
    return rates.pop() if len(rates) == 1 else None


def _write(
    model: nn.Module,
    folder: Path,
    data_config: Mapping[str, Any] | None,
    label_names: Sequence[str] | None,
) -> str:
    # safetensors takes neither channels_last tensors nor another process's view of the device
    plain = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    try:
        save_for_hf(
            plain,
            folder,
            model_config={"label_names": list(label_names)} if label_names is not None else None,
            model_args=_stripped_arguments(model),
            safe_serialization=True,
            data_config=dict(data_config or {}),
        )
    except ValueError as error:
        raise UserError(f"the model cannot be exported: {one_line(error)}") from error
    # safetensors makes files that only their owner can read
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)
    sha256 = file_sha256(folder / WEIGHTS)
    config = {**json.loads((folder / CONFIG).read_text()), "sha256": sha256}
    save_json(config, folder / CONFIG)
    return sha256


def _stripped_arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments that timm leaves out of a config, as they stand: drop rates."""
    known = dict(getattr(model, "_model_args", {}))
    kept = {key: value for key, value in known.items() if key.endswith("drop_rate")}
    kept |= {key: known[key] for key in ("drop_path_rate", "drop_block_rate") if key in known}
    if "regularizers" in known:
        kept["regularizers"] = [dict(entry) for entry in known["regularizers"]]
        for entry in kept["regularizers"]:
            rate = shared_rate(model, entry["name"])
            if rate is not None:
                entry["drop_prob"] = rate
    name = known.get("base") or model.pretrained_cfg["architecture"]  # type: ignore[index]
    variant = variants.get(str(name).split(".")[0])
    attached = {entry["name"] for entry in known.get("regularizers", ())}
    if variant is not None and variant.regularizer not in attached:
        rate = shared_rate(model, variant.regularizer)
        if rate is not None:
            kept |= {"keep_prob": 1.0 - rate} if "keep_prob" in known else {"drop_block_rate": rate}
    return kept


def _check(model: nn.Module, folder: Path) -> None:
    """What was written is the model, or it is not worth having."""
    with torch.random.fork_rng(devices=[]):
        rebuilt = timm.create_model(f"local-dir:{folder}", pretrained=True)
    wanted, found = layer_settings(model), layer_settings(rebuilt)
    if wanted != found:
        differs = [(a, b) for a, b in zip(wanted, found, strict=False) if a != b]
        what = f"{differs[0][0]} would become {differs[0][1]}" if differs else "layers are missing"
        raise UserError(
            "a model's regularizers must be set by the arguments of timm.create_model or attach "
            f"to be exported; {what}"
        )
