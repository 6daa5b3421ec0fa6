"""Where in a model a regularizer can sit, and how it gets there.

A slot is a place in the forward pass. Kinds:

- ``stem``: after the first convolution, its normalisation and its activation, before any pooling;
- ``conv``: after a convolution and the normalisation and activation that follow it directly;
- ``last_conv``: the same for the last convolution of a residual branch, before the addition;
- ``skip_in``: on the skip connection of a residual block, before its projection;
- ``skip``: on the skip connection of a residual block, after its projection where there is one;
- ``stage``: at the end of a stage.

These can be asked for by kind. Two more kinds are of slots that are found otherwise: ``module``,
after a module that is named, and ``head``, before the classifier.

Stages are the papers' groups: ``layer1``, ``layer2``, ... where a network names them so (timm's
ResNets, the small ones here), and elsewhere 1 to 4 for the maps at 1/4, 1/8, 1/16 and 1/32 of the
image. Stage 0 is the stem.
"""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from timm.models import BasicBlock, Bottleneck
from torch import nn

from timm_structdrop.errors import UserError
from timm_structdrop.layers import StructDropLayer
from timm_structdrop.models.hanging import hang
from timm_structdrop.models.trace import NORMS, Step, trace

__all__ = ["KINDS", "Slot", "find_slots", "insert", "stage_modules", "stem_slot"]

KINDS = ("stem", "conv", "last_conv", "skip_in", "skip", "stage")


@dataclass(frozen=True)
class Slot:
    """A place for a regularizer: after module ``path``, or in its stead where that is None; before
    it if the kind is ``skip_in`` or ``head`` (the classifier).

    Attributes:
        path: name of the module in the model.
        kind: one of :data:`KINDS`, ``module`` or ``head``.
        stage: number of the stage; 0 for the stem, ``module`` and ``head``.
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

    The network is run once on a zero image of ``img_size`` = (H, W). timm's ResNet blocks are read
    by their attributes instead, because an empty skip is None there.
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
    appended, and any other module gets it as a child that a forward hook calls on its output. For a
    slot before the module it is the same at the other end: prepended, or a hook on its input.

    Raises:
        ValueError: a regularizer of this name is there already.
    """
    parent_path, _, name = slot.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    module = getattr(parent, name)
    child = layer.regularizer
    before = slot.kind in ("skip_in", "head")
    if module is None or type(module) is nn.Identity:
        setattr(parent, name, layer)
        return
    if isinstance(module, StructDropLayer) and module.regularizer != child:
        pair = [(module.regularizer, module), (child, layer)]
        setattr(parent, name, nn.Sequential(OrderedDict(reversed(pair) if before else pair)))
        return
    if isinstance(module, StructDropLayer) or hasattr(module, child):
        raise UserError(f"a slot takes each regularizer once; {slot.path} has {child} already")
    if isinstance(module, nn.Sequential):
        later = list(module.named_children()) if before else []
        for path, _ in later:
            delattr(module, path)
        for path, part in [(child, layer), *later]:
            module.add_module(path, part)
        return
    hang(model, slot.path, child, layer, before)


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
            yield Slot(f"{path}.downsample", "skip_in", number)
            yield Slot(f"{path}.downsample", "skip", number)


def _traced_slots(steps: list[Step], stages: dict[int, str]) -> Iterator[Slot]:
    """The slots of a network of unknown structure, from the order in which its modules ran.

    A residual block is a module with timm's ``drop_path``: that is where its branch ends, and its
    ``shortcut`` or ``downsample``, if it ran, is its skip. (One that is None stays alone: in some
    networks that means a block without a skip.)
    """
    calls = Counter(step.path for step in steps)
    finished = {step.path: index for index, step in enumerate(steps)}
    ends = sorted((finished[path], number) for number, path in stages.items() if path in finished)

    def stage_at(path: str) -> int | None:
        return next((number for end, number in ends if end >= finished[path]), None)

    blocks = [step.path.rpartition(".")[0] for step in steps if _is_branch_end(step)]
    skips = [f"{block}.{name}" for block in blocks for name in ("shortcut", "downsample")]
    skips = [path for path in skips if path in finished]
    for run in _runs(steps)[1:]:
        number = stage_at(run[-1].path)
        in_skip = any(f"{run[0].path}.".startswith(f"{path}.") for path in skips)
        if number is None or in_skip or not _is_map(run[0]):
            continue
        if not any(_is_branch_end(step) for step in run):
            yield Slot(_end(run, calls), "conv", number)
    branch_ends = [f"{block}.drop_path" for block in blocks]
    for kind, paths in (("last_conv", branch_ends), ("skip_in", skips), ("skip", skips)):
        for path in paths:
            number = stage_at(path)
            if number is not None:
                yield Slot(path, kind, number)


def _is_branch_end(step: Step) -> bool:
    return step.path.endswith(".drop_path") and _is_map(step)


def _is_map(step: Step) -> bool:
    return step.shape is not None and step.shape[1:] != (1, 1)


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
