"""Which slots of a model get which regularizer: the papers' placements, and others by keyword."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from timm.layers import DropBlock2d as TimmDropBlock2d
from timm.layers import DropPath, register_notrace_module
from torch import nn

from timm_structdrop.errors import UserError, nearest
from timm_structdrop.layers import Placement, StructDropLayer, regularizers
from timm_structdrop.models._chosen_slots import image_size, slots_after, slots_of_kinds
from timm_structdrop.models._reset import keep_on_reset
from timm_structdrop.models._where import groups_in_words, kinds_in_words, slots_in_words
from timm_structdrop.models.forking import (
    head_setting,
    head_slot,
    insert_fork,
    refuse_second_fork,
)
from timm_structdrop.models.slots import Slot, insert, stage_modules
from timm_structdrop.models.trace import map_shape

__all__ = [
    "PLACEMENT_KEYWORDS",
    "check_settings",
    "paper_schedule",
    "place",
    "placed_in_words",
    "rule_in_words",
    "set_drop_prob",
    "structdrop_layers",
    "where_in_words",
]

PLACEMENT_KEYWORDS = ("stages", "where", "modules", "img_size")


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
    if layer.forks:
        refuse_second_fork(model, name)
    default = regularizers[name].placement
    on_head = head_setting(layer, settings)
    if on_head:
        if not stages is where is modules is None:
            raise UserError(
                f"{on_head} acts before the classifier: stages, where and modules must be left "
                f"out; got {stages or where or modules}"
            )
        slots = [head_slot(model, on_head)]
    elif modules is None:
        kinds = default.where if where is None else where
        slots = slots_of_kinds(model, name, kinds, stages, default.last_stages, size)
    else:
        slots = slots_after(model, modules)
    if drop_prob is not None:
        settings["drop_prob"] = drop_prob
    built = _build(layer, model, slots, default, settings, size)
    register_notrace_module(layer)  # FX cannot follow the branches that it takes
    for slot, module in built:
        module.train(model.training)
        insert(model, slot, module)
    if layer.forks:
        insert_fork(model, name, slots, size)
    keep_on_reset(model, built)
    _note_where(model, name, placed_in_words(default, model, slots))
    return model


def rule_in_words(placement: Placement) -> str:
    """The rule of a placement, whatever the network."""
    known = {0: "", 1: " of the last group", 2: " of the last two groups"}
    of = known.get(placement.last_stages, f" of the last {placement.last_stages} groups")
    early = f"{placement.early_words} in all but the last group" if placement.early else ""
    return ", ".join(filter(None, (kinds_in_words(placement.where) + of, early, placement.note)))


def placed_in_words(placement: Placement, model: nn.Module, slots: Sequence[Slot]) -> str:
    """Where the layers in these slots of a model are, and what else there is to say."""
    stages = sorted({slot.stage for slot in slots if _is_early(placement, model, slot)})
    early = f"{placement.early_words} in {groups_in_words(stages)}" if stages else ""
    return ", ".join(filter(None, (slots_in_words(slots), early, placement.note)))


def _is_early(placement: Placement, model: nn.Module, slot: Slot) -> bool:
    """Whether a layer there has the settings ``early``."""
    if not placement.early or slot.kind in ("module", "stage"):
        return False
    return slot.stage < max(stage_modules(model))


def where_in_words(model: nn.Module, name: str) -> str | None:
    """Where in a model :func:`place` has put a regularizer; None where it has not."""
    placed: dict[str, str] = getattr(model, "_where_placed", {})
    return placed.get(name)


def _note_where(model: nn.Module, name: str, words: str) -> None:
    before = where_in_words(model, name)
    noted = {**getattr(model, "_where_placed", {}), name: f"{before}; {words}" if before else words}
    model._where_placed = noted  # type: ignore[assignment]


def _build(
    layer: type[StructDropLayer],
    model: nn.Module,
    slots: Sequence[Slot],
    default: Placement,
    settings: dict[str, Any],
    img_size: tuple[int, int],
) -> list[tuple[Slot, StructDropLayer]]:
    """A layer for each slot; the early ones with the settings that the placement has for them."""
    built = []
    for slot in slots:
        own = default.early if _is_early(default, model, slot) else {}
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
    names = {layer.regularizer for layer in structdrop_layers(model)}
    shapes = {regularizers[name].placement.schedule for name in names}
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
