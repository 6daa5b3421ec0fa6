"""What a card says of a model, read off the model: its size, its cost, its regularizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_structdrop.layers import FittedLayer, StructDropLayer
from timm_structdrop.models.modes import eval_mode
from timm_structdrop.models.structdrop_variants import variants
from timm_structdrop.models.trace import first_conv

__all__ = [
    "ModelStats",
    "RegularizerUse",
    "architecture_name",
    "fitted_clusters",
    "model_stats",
    "regularizer_uses",
]


@dataclass(frozen=True)
class ModelStats:
    """Figures of one forward pass of one image, as timm's cards give them.

    Attributes:
        input_size: (C, H, W).
        params: parameters.
        macs: multiply-adds of convolutions and linear layers.
        activations: outputs of convolutions and linear layers.
        feature_shapes: what a `features_only` model returns for one image, if known.
        map_shape: what `forward_features` returns for one image.
        embedding: length of what `forward_head(..., pre_logits=True)` returns for one image.
    """

    input_size: tuple[int, int, int]
    params: int
    macs: int
    activations: int
    feature_shapes: list[tuple[int, ...]]
    map_shape: tuple[int, ...]
    embedding: int


@dataclass(frozen=True)
class RegularizerUse:
    """One regularizer of a model.

    Attributes:
        name: a key of `timm_structdrop.regularizers`.
        layers: its layers, by the names of their modules.
        settings: the settings and their values, without the rate; where layers differ, all values.
    """

    name: str
    layers: dict[str, StructDropLayer]
    settings: dict[str, list[Any]]


def model_stats(model: nn.Module) -> ModelStats:
    """Size and cost of `model` at the input size of its `pretrained_cfg`.

    The model runs on a zero image in eval mode; its training flags are as before.
    """
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    height, width = tuple(cfg.get("input_size", (3, 224, 224)))[1:]
    size = (first_conv(model).in_channels, height, width)
    weight = next(model.parameters())
    image = torch.zeros(1, *size, device=weight.device, dtype=weight.dtype)
    outputs: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(output.numel())

    handles = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        with eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as flops:
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    params = sum(parameter.numel() for parameter in model.parameters())
    macs = flops.get_total_flops() // 2
    return ModelStats(size, params, macs, sum(outputs), *_output_shapes(model, image))


@torch.no_grad()
def _output_shapes(model: Any, image: Tensor) -> tuple[list[tuple[int, ...]], tuple[int, ...], int]:
    variant = variants.get(architecture_name(model))
    features: list[tuple[int, ...]] = []
    with eval_mode(model):
        maps = model.forward_features(image)
        embedding = model.forward_head(maps, pre_logits=True)
        if variant is not None and hasattr(model, "forward_intermediates"):
            found = model.forward_intermediates(image, intermediates_only=True)
            wanted = variant.architecture.out_indices
            features = [tuple(found[index].shape) for index in wanted if index < len(found)]
    return features, tuple(maps.shape), embedding.shape[-1]


def architecture_name(model: nn.Module) -> str:
    """The name under which timm makes the model, without a tag."""
    return str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", "model"))


def regularizer_uses(model: nn.Module) -> list[RegularizerUse]:
    """The regularizers of a model, in the order of their first layers."""
    found: dict[str, dict[str, StructDropLayer]] = {}
    for path, module in model.named_modules():
        if isinstance(module, StructDropLayer):
            found.setdefault(module.regularizer, {})[path] = module
    uses = []
    for name, layers in found.items():
        settings: dict[str, list[Any]] = {}
        for layer in layers.values():
            for key, value in layer.settings().items():
                values = settings.setdefault(key, [])
                if key != "drop_prob" and value not in values:
                    values.append(value)
        settings.pop("drop_prob")
        uses.append(RegularizerUse(name, layers, settings))
    return uses


def fitted_clusters(use: RegularizerUse) -> dict[str, FittedLayer]:
    """The layers whose clusters have been found."""
    return {
        path: layer
        for path, layer in use.layers.items()
        if isinstance(layer, FittedLayer) and layer.is_fitted
    }
