"""Watching the maps at chosen places of a model while images run through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from timm_structdrop.errors import UserError, nearest
from timm_structdrop.layers import FittedLayer, StructDropLayer
from timm_structdrop.models.modes import eval_mode
from timm_structdrop.models.slots import find_slots

__all__ = [
    "LAYER_CHOICES",
    "Place",
    "cluster_layers",
    "cluster_places",
    "collect_maps",
    "find_places",
    "place_named",
    "watch_maps",
]

LAYER_CHOICES = {
    "stages": ("stem", "stage"),
    "convs": ("stem", "conv", "last_conv"),
}


@dataclass(frozen=True)
class Place:
    """A place in a model, and the map that a regularizer there sees (or would see).

    Attributes:
        name: name of the module the place comes after.
        kind: ``stem``, ``conv``, ``last_conv``, ``stage``, ``dropcluster`` for the place of a layer
            that is at none of these, or ``module`` for one that was named.
        module: the module that is watched.
        watches_input: the map is the module's input, because it is a regularizer; else its output.
    """

    name: str
    kind: str
    module: nn.Module
    watches_input: bool


def find_places(model: nn.Module, img_size: tuple[int, int], layers: str = "stages") -> list[Place]:
    """Candidate places for DropCluster: the stem and each stage's end, or the stem and each
    convolution; and the places of the model's DropCluster layers.

    Args:
        model: a timm CNN.
        img_size: (H, W) of its images.
        layers: ``"stages"`` or ``"convs"``.

    Raises:
        UserError: ``layers`` is neither, or the model is not a CNN or too deep for such images.
    """
    if layers not in LAYER_CHOICES:
        raise UserError(f"layers must be one of {', '.join(LAYER_CHOICES)}; got {layers!r}")
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        raise UserError(
            f"maps must be (B, C, H, W); those of {type(model).__name__} are (B, H, W, C)"
        )
    try:
        slots = find_slots(model, img_size)
    except RuntimeError as error:
        raise UserError(
            f"{type(model).__name__} must run on {img_size[0]}x{img_size[1]} images; {error}"
        ) from error
    places: dict[str, Place] = {}
    for slot in slots:
        if slot.kind in LAYER_CHOICES[layers] and slot.path not in places:
            path = _last_norm(model, slot.path) if slot.kind == "last_conv" else slot.path
            places[path] = _place(model, path, slot.kind)
    for own in cluster_places(model):
        places.setdefault(own.name, own)
    return list(places.values())


def cluster_places(model: nn.Module) -> list[Place]:
    """The places of the model's DropCluster layers."""
    return [
        Place(name, layer.regularizer, layer, True) for name, layer in cluster_layers(model).items()
    ]


def cluster_layers(model: nn.Module) -> dict[str, FittedLayer]:
    """The model's DropCluster layers by the name of the module that they come after."""
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, FittedLayer):
            parent, _, name = path.rpartition(".")
            layers[parent if name == module.regularizer else path] = module
    return layers


def place_named(model: nn.Module, name: str) -> Place:
    """The place after the module ``name``, before the regularizers that are there already.

    Raises:
        UserError: the model has no such module.
    """
    known = dict(model.named_modules())
    if not name or name not in known:
        raise UserError(
            f"a layer must be a module of {type(model).__name__}; "
            f"got {name!r}{nearest(name, known)}"
        )
    return _place(model, name, "module")


def _last_norm(model: nn.Module, path: str) -> str:
    """In timm's residual blocks without stochastic depth, the slot at the branch's end is None;
    its map is that of the last batch norm then."""
    parent, _, name = path.rpartition(".")
    block = model.get_submodule(parent)
    if getattr(block, name) is not None:
        return path
    return f"{parent}.bn3" if hasattr(block, "bn3") else f"{parent}.bn2"


def _place(model: nn.Module, path: str, kind: str) -> Place:
    """What a layer after ``path`` would see: before the regularizers that are there already."""
    module = model.get_submodule(path)
    if isinstance(module, StructDropLayer):
        return Place(path, kind, module, True)
    for child in module.children():
        if isinstance(child, StructDropLayer):
            return Place(path, kind, child, True)
    return Place(path, kind, module, False)


@torch.no_grad()
def watch_maps(
    model: nn.Module,
    places: Sequence[Place],
    images: Tensor,
    see: Callable[[Place, Tensor], object],
    batch_size: int = 64,
) -> None:
    """Run images through the model in eval mode and show ``see`` the map at each place.

    A module that runs several times in one forward pass is seen the first time. What ``see`` gets
    may be overwritten by the model afterwards.

    Args:
        model: its training flags are as before afterwards.
        places: of this model.
        images: (N, C, H, W), on any device.
        see: called with a place and its map of one batch, (B, C, H, W), in the order in which the
            maps are computed.
        batch_size: images per forward pass.

    Raises:
        UserError: a map is not (B, C, H, W).
    """
    seen: set[str] = set()

    def watch(place: Place, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        shown = args[0] if place.watches_input else output
        if place.name in seen:
            return
        if not isinstance(shown, Tensor) or shown.ndim != 4:
            raise UserError(f"maps must be (B, C, H, W) tensors; {place.name} has none")
        seen.add(place.name)
        see(place, shown)

    weight = next(model.parameters())
    with eval_mode(model), ExitStack() as hooks:
        for place in places:
            if place.watches_input:
                hooks.enter_context(place.module.register_forward_pre_hook(partial(watch, place)))
            else:
                hooks.enter_context(place.module.register_forward_hook(partial(watch, place)))
        for batch in images.split(batch_size):
            seen.clear()
            model(batch.to(device=weight.device, dtype=weight.dtype))


def collect_maps(model: nn.Module, place: Place, images: Tensor, batch_size: int = 64) -> Tensor:
    """The map at one place for all images, (N, C, H, W) float32 on the CPU, from :func:`watch_maps`
    (same arguments and errors)."""
    maps: list[Tensor] = []
    watch_maps(
        model,
        [place],
        images,
        lambda _, shown: maps.append(shown.float().cpu().clone()),
        batch_size,
    )
    return torch.cat(maps)
