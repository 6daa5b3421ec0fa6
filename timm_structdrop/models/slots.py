"""Where in a model a regularizer can sit, and how it gets there.

A slot is a place in the forward pass. Kinds:

- ``stem``: after the first convolution, its normalisation and its activation, before any pooling;
- ``conv``: after a convolution and the normalisation and activation that follow it directly;
- ``last_conv``: the same for the last convolution of a residual branch, before the addition;
- ``skip``: on the skip connection of a residual block, after its projection where there is one;
- ``stage``: at the end of a stage.

Stages are the papers' groups: ``layer1``, ``layer2``, ... where a network names them so (timm's
ResNets, the small ones here), and elsewhere 1 to 4 for the maps at 1/4, 1/8, 1/16 and 1/32 of the
image. Stage 0 is the stem.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.models import BasicBlock, Bottleneck
from torch import nn

from timm_structdrop.errors import UserError
from timm_structdrop.layers import StructDropLayer
from timm_structdrop.models._trace import NORMS, Step, trace

__all__ = ["KINDS", "Slot", "find_slots", "insert", "stage_modules", "stem_slot"]

KINDS = ("stem", "conv", "last_conv", "skip", "stage")


@dataclass(frozen=True)
class Slot:
    """A place for a regularizer: after module ``path``, or in its stead where that is None.

    Attributes:
        path: name of the module in the model.
        kind: one of :data:`KINDS`.
        stage: number of the stage, 0 for the stem.
    """

    path: str
    kind: str
    stage: int


def stage_modules(model: nn.Module) -> dict[int, str]:
    """The module that ends each stage, by stage number from 1, from timm's ``feature_info``.

    Raises:
        ValueError: the model has no ``feature_info``.
    """
    info = getattr(model, "feature_info", None)
    if not info:
        raise UserError(
            "stages are read from timm's feature_info; "
            f"{type(model).__name__} has none: name the modules instead"
        )
    stages = {}
    for entry in info:
        module, reduction = entry["module"], entry["reduction"]
        named = re.fullmatch(r"layer(\d+)", module)
        if named:
            stages[int(named[1])] = module
        elif reduction >= 4 and not any(path.startswith("layer") for path in stages.values()):
            stages[int(math.log2(reduction)) - 1] = module
    return stages


def stem_slot(model: nn.Module, img_size: tuple[int, int]) -> Slot:
    """The ``stem`` slot, found by running the model up to its second convolution."""

    def stem_is_over(steps: list[Step]) -> bool:
        return steps[-1].leaf and len(_runs(steps)) > 1

    runs = _runs(trace(model, img_size, until=stem_is_over))
    return Slot(_end(runs[0], {}), "stem", 0)


def find_slots(model: nn.Module, img_size: tuple[int, int]) -> list[Slot]:
    """Every slot of the model, in the order of the forward pass where it is known.

    timm's ResNet blocks are read by their attributes, and have all kinds; other networks are run
    once on a zero image of ``img_size`` = (H, W), and have no ``last_conv`` and ``skip``.
    """
    stages = stage_modules(model)
    steps = trace(model, img_size)
    calls = Counter(step.path for step in steps)
    maps = {step.path for step in steps if step.shape is not None}
    slots = [Slot(_end(_runs(steps)[0], calls), "stem", 0)]
    slots += list(_residual_slots(model, stages)) or list(_traced_slots(steps, stages))
    slots += [Slot(path, "stage", n) for n, path in stages.items() if path in maps]
    return slots


def insert(model: nn.Module, slot: Slot, layer: StructDropLayer) -> None:
    """Put ``layer`` into ``slot``; keys of the model's state_dict stay as they are.

    An empty place (None or ``nn.Identity``) takes the layer itself, an ``nn.Sequential`` gets it
    appended, and any other module gets it as a child that a forward hook calls on its output.

    Raises:
        ValueError: a regularizer of this name is there already.
    """
    parent_path, _, name = slot.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    module = getattr(parent, name)
    child = layer.regularizer
    if module is None or type(module) is nn.Identity:
        setattr(parent, name, layer)
        return
    if isinstance(module, StructDropLayer) and module.regularizer != child:
        both = nn.Sequential()
        both.add_module(module.regularizer, module)
        both.add_module(child, layer)
        setattr(parent, name, both)
        return
    if isinstance(module, StructDropLayer) or hasattr(module, child):
        raise UserError(f"a slot takes each regularizer once; {slot.path} has {child} already")
    module.add_module(child, layer)
    if not isinstance(module, nn.Sequential):
        module.register_forward_hook(partial(_call_child, child))


def _call_child(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return module.get_submodule(name)(output)


def _residual_slots(model: nn.Module, stages: dict[int, str]) -> Iterator[Slot]:
    modules = dict(model.named_modules())
    for number, stage_path in stages.items():
        for name, block in modules.get(stage_path, nn.Sequential()).named_children():
            if not isinstance(block, BasicBlock | Bottleneck):
                continue
            path = f"{stage_path}.{name}"
            yield Slot(f"{path}.act1", "conv", number)
            if isinstance(block, Bottleneck):
                yield Slot(f"{path}.act2", "conv", number)
            yield Slot(f"{path}.drop_path", "last_conv", number)
            yield Slot(f"{path}.downsample", "skip", number)


def _traced_slots(steps: list[Step], stages: dict[int, str]) -> Iterator[Slot]:
    """``conv`` slots of a network of unknown structure, from the order in which its modules ran."""
    calls = Counter(step.path for step in steps)
    finished = {step.path: index for index, step in enumerate(steps)}
    ends = sorted((finished[path], number) for number, path in stages.items() if path in finished)
    for run in _runs(steps)[1:]:
        position = finished[run[-1].path]
        number = next((number for end, number in ends if end >= position), None)
        if number is not None and run[0].shape is not None and run[0].shape[1:] != (1, 1):
            yield Slot(_end(run, calls), "conv", number)


def _runs(steps: list[Step]) -> list[list[Step]]:
    """Each convolution with the leaves that follow it directly on maps of the same shape."""
    runs: list[list[Step]] = []
    running = False
    for step in (step for step in steps if step.leaf):
        if isinstance(step.module, nn.Conv2d):
            runs.append([step])
            running = True
        elif running and step.chained and step.shape == runs[-1][0].shape and not _is_pool(step):
            runs[-1].append(step)
        else:
            running = False
    return runs


def _end(run: list[Step], calls: Mapping[str, int]) -> str:
    """The module after which a run is over, of those that the forward pass calls once (an
    activation may serve several places); the activation inside it for timm's norm-act layers,
    because conversion to SyncBatchNorm keeps that and not what hangs on the norm itself."""
    acting = [step for step in run if type(step.module) is not nn.Identity]
    last = ([step for step in acting if calls.get(step.path, 1) == 1] or acting)[-1]
    has_act = isinstance(last.module, NORMS) and isinstance(
        getattr(last.module, "act", None), nn.Module
    )
    return f"{last.path}.act" if has_act else last.path


def _is_pool(step: Step) -> bool:
    return "pool" in type(step.module).__name__.lower()
