"""Which slots of a model get which regularizer: the papers' placements, and others by keyword."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from timm.layers import DropBlock2d as TimmDropBlock2d
from timm.layers import DropPath, register_notrace_module
from torch import nn

from timm_structdrop.errors import UserError, nearest
from timm_structdrop.layers import RBlock2d, StructDropLayer, regularizers
from timm_structdrop.models._chosen_slots import image_size, slots_after, slots_of_kinds
from timm_structdrop.models._reset import keep_on_reset
from timm_structdrop.models._trace import map_shape
from timm_structdrop.models.forking import (
    head_slot,
    insert_fork,
    is_on_head,
    refuse_second_fork,
)
from timm_structdrop.models.slots import Slot, insert, stage_modules

__all__ = [
    "PLACEMENTS",
    "PLACEMENT_KEYWORDS",
    "Placement",
    "check_settings",
    "paper_schedule",
    "place",
    "set_drop_prob",
    "structdrop_layers",
]

PLACEMENT_KEYWORDS = ("stages", "where", "modules", "img_size")


@dataclass(frozen=True)
class Placement:
    """Where a regularizer sits unless the user says otherwise.

    Attributes:
        where: kinds of slots, see :mod:`timm_structdrop.models.slots`.
        last_stages: how many stages, counted from the deepest; 0 means all.
        summary: the same in words.
        early: settings of the layers in all but the deepest of these stages.
        schedule: the paper's drop schedule, a shape of
            :class:`timm_structdrop.training.DropSchedule`.
    """

    where: tuple[str, ...]
    last_stages: int
    summary: str
    early: tuple[tuple[str, Any], ...] = ()
    schedule: str = "constant"


PLACEMENTS: dict[str, Placement] = {
    "dropcluster": Placement(("stem",), 0, "stem convolution, before any pooling"),
    "dropblock": Placement(
        ("conv", "last_conv", "skip"),
        2,
        "convolutions and skips of the last two groups, gamma / 4 in the first",
        early=(("gamma_scale", 0.25),),
        schedule="linear",
    ),
    "camdrop": Placement(
        ("skip_in", "conv", "last_conv"),
        2,
        "convolutions and skips (before projection) of the last two groups",
    ),
    "dropout": Placement(("conv", "last_conv"), 1, "convolutions of the last group"),
    "spatialdropout": Placement(("conv", "last_conv"), 1, "convolutions of the last group"),
    "rblock": Placement(
        ("conv", "last_conv", "skip"),
        2,
        "convolutions and skips of the last two groups, fork in front of them",
    ),
    "stochasticdepth": Placement(("last_conv",), 0, "every residual branch, one rate for all"),
}
OTHERS = Placement(("conv",), 1, "convolutions of the last group")


def place(
    model: nn.Module,
    name: str,
    *,
    drop_prob: float | None = None,
    stages: Sequence[int] | None = None,
    where: str | Sequence[str] | None = None,
    modules: Sequence[str] | None = None,
    img_size: int | tuple[int, int] | None = None,
    **settings: Any,
) -> nn.Module:
    """Put a regularizer into a CNN, in place.

    The state_dict keys of the model stay as they are (DropCluster adds its buffers) and so does
    its output in eval mode.

    Args:
        model: a timm CNN, or any CNN if ``modules`` are named.
        name: a key of :data:`timm_structdrop.regularizers`.
        drop_prob: rate in [0, 1); None takes the layer's default.
        stages: stage numbers (3 and 4 are the maps at 1/16 and 1/32 of the image); None takes the
            paper's stages.
        where: kinds of slots (``stem``, ``conv``, ``last_conv``, ``skip_in``, ``skip``,
            ``stage``); None takes the paper's.
        modules: names of modules to put a layer after, in place of ``stages`` and ``where``.
        img_size: training resolution, H = W or (H, W), for layers that keep state per pixel and
            for the one forward pass that finds the slots; None takes the model's ``input_size``.
        settings: keywords of the layer.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown name, stage, kind, module or setting, or a model without a place
            for the regularizer.
    """
    layer = _layer_class(name)
    check_settings(layer, settings)
    size = image_size(model, img_size)
    if issubclass(layer, RBlock2d):
        refuse_second_fork(model)
    default = PLACEMENTS.get(name, OTHERS)
    if name == "rblock" and is_on_head(settings):
        if not stages is where is modules is None:
            raise UserError(
                f"sub_models {settings['sub_models']!r} acts before the classifier: stages, where "
                f"and modules must be left out; got {stages or where or modules}"
            )
        slots = [head_slot(model)]
    elif modules is None:
        kinds = default.where if where is None else where
        slots = slots_of_kinds(model, name, kinds, stages, default.last_stages, size)
    else:
        slots = slots_after(model, modules)
    early = dict(default.early) if modules is None else {}
    if drop_prob is not None:
        settings["drop_prob"] = drop_prob
    built = _build(layer, model, slots, early, settings, size)
    register_notrace_module(layer)  # FX cannot follow the branches that it takes
    for slot, module in built:
        module.train(model.training)
        insert(model, slot, module)
    if issubclass(layer, RBlock2d):
        insert_fork(model, slots, size)
    keep_on_reset(model, built)
    return model


def _build(
    layer: type[StructDropLayer],
    model: nn.Module,
    slots: Sequence[Slot],
    early: dict[str, Any],
    settings: dict[str, Any],
    img_size: tuple[int, int],
) -> list[tuple[Slot, StructDropLayer]]:
    """A layer for each slot; in all but the deepest stage with the settings ``early`` as well."""
    deepest = max(stage_modules(model)) if early else 0
    built = []
    for slot in slots:
        own = early if slot.stage < deepest and slot.kind != "stage" else {}
        shape = _map_shape(layer, model, slot, img_size)
        try:
            built.append((slot, layer.build(*shape, **{**own, **settings})))
        except (TypeError, ValueError) as error:
            raise UserError(f"{layer.regularizer}: {error}") from error
    return built


def set_drop_prob(model: nn.Module, drop_prob: float, include_timm: bool = False) -> None:
    """Set the rate of every structured-dropout layer of a model.

    Args:
        model: a model with regularizers.
        drop_prob: rate in [0, 1).
        include_timm: also set timm's own ``DropPath`` and ``DropBlock2d``.

    Raises:
        ValueError: ``drop_prob`` is out of range, or the model has no such layer.
    """
    layers = list(structdrop_layers(model))
    timm_layers = [m for m in model.modules() if isinstance(m, DropPath | TimmDropBlock2d)]
    if not layers and not (include_timm and timm_layers):
        raise UserError(
            f"set_drop_prob needs a structured-dropout layer; {type(model).__name__} has none"
        )
    for layer in layers:
        layer.set_drop_prob(drop_prob)
    if include_timm:
        for timm_layer in timm_layers:
            timm_layer.drop_prob = float(drop_prob)


def structdrop_layers(model: nn.Module) -> Iterator[StructDropLayer]:
    """The regularizers of a model."""
    return (module for module in model.modules() if isinstance(module, StructDropLayer))


def paper_schedule(model: nn.Module) -> str:
    """The drop schedule of the papers for the regularizers of a model, a shape of
    :class:`timm_structdrop.training.DropSchedule`; ``constant`` where they disagree."""
    names = {layer.regularizer for layer in structdrop_layers(model)} & set(PLACEMENTS)
    shapes = {PLACEMENTS[name].schedule for name in names}
    return shapes.pop() if len(shapes) == 1 else "constant"


def check_settings(layer: type[StructDropLayer], settings: Collection[str]) -> None:
    """Raise UserError for a keyword that ``layer`` does not have."""
    valid = layer.setting_names()
    for key in settings:
        if key not in valid:
            raise UserError(
                f"a setting of {layer.regularizer} must be one of drop_prob, {', '.join(valid)}; "
                f"got {key!r}{nearest(key, valid)}"
            )


def _layer_class(name: str) -> type[StructDropLayer]:
    if name not in regularizers:
        raise UserError(
            f"a regularizer must be one of {', '.join(sorted(regularizers))}; "
            f"got {name!r}{nearest(name, regularizers)}"
        )
    return regularizers[name].layer


def _map_shape(
    layer: type[StructDropLayer], model: nn.Module, slot: Slot, img_size: tuple[int, int]
) -> tuple[int, tuple[int, int]]:
    """(C, (H, W)) of the slot's map, worked out only for layers that keep state per pixel."""
    if not layer.keeps_map_state:
        return 0, (0, 0)
    channels, height, width = map_shape(model, slot.path, img_size, slot.kind == "skip_in")
    return channels, (height, width)
