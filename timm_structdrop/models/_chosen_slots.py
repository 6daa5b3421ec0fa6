"""The slots of a model that a user's words mean: numbers of stages, kinds, names of modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from timm_structdrop.errors import UserError, nearest
from timm_structdrop.models.slots import KINDS, Slot, find_slots, stem_slot

__all__ = ["image_size", "slots_after", "slots_of_kinds"]

IMAGENET_SIZE = (224, 224)


def image_size(model: nn.Module, img_size: int | Sequence[int] | None) -> tuple[int, int]:
    """(H, W) from H = W, (H, W), or None for the model's ``input_size``.

    Raises:
        UserError: it is none of these.
    """
    if img_size is None:
        cfg = getattr(model, "pretrained_cfg", None) or {}
        _, height, width = cfg.get("input_size", (3, *IMAGENET_SIZE))
        return height, width
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"img_size must be one or two positive integers; got {img_size!r}")
    return size[0], size[1]


def slots_of_kinds(
    model: nn.Module,
    name: str,
    kinds: str | Sequence[str],
    stages: Sequence[int] | None,
    last_stages: int,
    img_size: tuple[int, int],
    found: Sequence[Slot] | None = None,
) -> list[Slot]:
    """The slots of these kinds in these stages.

    Args:
        model: a model with timm's ``feature_info``.
        name: the regularizer's, for the errors.
        kinds: one or several of :data:`~timm_structdrop.models.slots.KINDS`.
        stages: numbers of stages; None for the ``last_stages`` that have such a slot.
        last_stages: how many, counted from the deepest; 0 means all.
        img_size: (H, W) of the forward pass that finds the slots.
        found: all slots of the model, where they are known; then it does not run.

    Raises:
        UserError: an unknown kind or stage, or there is no such slot.
    """
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if not kinds:
        raise UserError("where must name at least one kind; got none")
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"where must name kinds of {', '.join(KINDS)}; got {kind!r}")
    if found is None:
        only_stem = tuple(kinds) == ("stem",)
        found = [stem_slot(model, img_size)] if only_stem else find_slots(model, img_size)
    slots = [slot for slot in found if slot.kind in kinds]
    have = sorted({slot.stage for slot in slots})
    if not slots:
        raise UserError(
            f"{name} needs a place of kind {' or '.join(kinds)}; "
            f"{type(model).__name__} has none: name modules to put it after"
        )
    if stages is not None and not isinstance(stages, Iterable):
        raise UserError(f"stages must be a list of numbers; got {stages!r}")
    wanted = have[-last_stages:] if stages is None else list(stages)
    if not wanted:
        raise UserError("stages must name at least one stage; got none")
    for stage in wanted:
        if stage not in have:
            raise UserError(
                f"stages of {type(model).__name__} with a place for {name} are "
                f"{', '.join(map(str, have))}; got {stage}"
            )
    return [slot for slot in slots if slot.stage in wanted]


def slots_after(model: nn.Module, modules: Sequence[str]) -> list[Slot]:
    """The slots after the modules of these names.

    Raises:
        UserError: there are no names, or one is not a module's.
    """
    known = dict(model.named_modules())
    if not modules:
        raise UserError("modules must name at least one module; got none")
    for path in modules:
        if path not in known or not path:
            raise UserError(
                f"modules must be names of modules of {type(model).__name__}; "
                f"got {path!r}{nearest(path, known)}"
            )
    return [Slot(path, "module", 0) for path in modules]
