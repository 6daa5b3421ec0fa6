"""Where the batch of an R-Block model forks: as late as all branches still agree on its size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import register_notrace_module
from timm.models import BasicBlock, Bottleneck
from torch import Tensor, nn

from timm_structdrop.errors import UserError
from timm_structdrop.layers import Fork, StructDropLayer
from timm_structdrop.models.slots import Slot, stage_modules
from timm_structdrop.models.trace import forward_zeros

__all__ = ["head_setting", "head_slot", "insert_fork", "refuse_second_fork"]


def head_setting(layer: type[StructDropLayer], settings: dict[str, Any]) -> str:
    """The setting with which the layer acts on the features before the classifier, such as
    ``sub_models 'r-drop'``; empty if there is none."""
    for key, values in layer.head_settings.items():
        if settings.get(key) in values:
            return f"{key} {settings[key]!r}"
    return ""


def head_slot(model: nn.Module, setting: str) -> Slot:
    """The place before the model's classifier, by timm's ``get_classifier``.

    Args:
        model: with its classifier.
        setting: of :func:`head_setting`, what asks for the place.

    Raises:
        UserError: the model does not say what its classifier is.
    """
    get = getattr(model, "get_classifier", None)
    classifier = get() if callable(get) else None
    for path, module in model.named_modules():
        if path and module is classifier:
            return Slot(path, "head", 0)
    raise UserError(
        f"{setting} acts before one classifier, which timm's models name by get_classifier; "
        f"{type(model).__name__} has none"
    )


def refuse_second_fork(model: nn.Module, name: str) -> None:
    """Raise UserError if the model has a fork, which the regularizer ``name`` needs."""
    if any(isinstance(module, Fork) for module in model.modules()):
        raise UserError(
            f"a model is forked once: name all stages or modules of {name} in one call; "
            f"{type(model).__name__} is forked already"
        )


def insert_fork(
    model: nn.Module, name: str, slots: Sequence[Slot], img_size: tuple[int, int]
) -> None:
    """Fork the batch in front of the layers that fork, in a :class:`~timm_structdrop.layers.Fork`.

    In residual networks with stages ``layer1``, ``layer2``, ... it is the entrance of the first
    regularized stage. Elsewhere it is the innermost place around the first layer, the layer itself
    first, from which a doubled batch reaches all layers and the output, found by running the
    network in eval mode. Where branches of the network pass by all of these, as in an HRNet, it is
    the first module to run or, if images go elsewhere too, the model itself: then all of the model
    runs on both halves. Keys of the state_dict stay as they are.

    Args:
        model: the model with its layers in place.
        name: their regularizer.
        slots: where they are.
        img_size: (H, W) for that forward pass.

    Raises:
        UserError: there is no such place: the model does not keep its images apart.
    """
    entrance = _stage_entrance(model, slots)
    for path in [entrance] if entrance is not None else _places(model, img_size):
        if path == entrance or _doubles_everything(model, path, img_size):
            register_notrace_module(Fork)
            module = model.get_submodule(path)
            module.add_module("fork", Fork().train(model.training))
            module.register_forward_pre_hook(_call_fork)
            return
    raise UserError(
        f"{name} needs a place from which a doubled batch reaches all its layers and the output; "
        f"{type(model).__name__} has none before {slots[0].path}: choose other stages or modules"
    )


def _forks(module: nn.Module) -> bool:
    return isinstance(module, StructDropLayer) and module.forks


def _call_fork(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    fork: Any = module.fork
    return (fork(args[0]), *args[1:])


def _stage_entrance(model: nn.Module, slots: Sequence[Slot]) -> str | None:
    """The first block of the first stage, if it is one of timm's residual blocks."""
    first = min(slot.stage for slot in slots)
    if first < 1 or any(slot.kind == "stage" for slot in slots):
        return None
    path = _first_called(model, stage_modules(model)[first])
    return path if isinstance(model.get_submodule(path), BasicBlock | Bottleneck) else None


def _places(model: nn.Module, img_size: tuple[int, int]) -> list[str]:
    """Where the fork may be, the latest first: at the first layer that forks to run, at the
    modules around it, innermost first, at the first module to run, and at the model."""
    ran: list[str] = []
    layers: list[str] = []

    def note(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        (layers if _forks(module) else ran).append(path)

    handles = [
        module.register_forward_pre_hook(partial(note, path))
        for path, module in model.named_modules()
        if path
    ]
    try:
        forward_zeros(model, img_size)
    finally:
        for handle in handles:
            handle.remove()
    if not layers:
        return []
    names = layers[0].split(".")
    around = (_first_called(model, ".".join(names[:n])) for n in range(len(names), 0, -1))
    at_input = (_first_called(model, path) for path in ran[:1])
    return list(dict.fromkeys((*around, *at_input, "")))


def _first_called(model: nn.Module, path: str) -> str:
    """``path``, or the first module inside of it that is no ``nn.Sequential``: whoever checkpoints
    or takes features runs the children of those one by one, without the hooks of the chain."""
    module = model.get_submodule(path)
    while type(module) is nn.Sequential and len(module):
        name, module = next(iter(module.named_children()))
        path = f"{path}.{name}"
    return path


def _doubles_everything(model: nn.Module, path: str, img_size: tuple[int, int]) -> bool:
    """Whether a batch doubled in front of ``path`` is double in what forks, and at the end."""
    batches: list[int] = []

    def double(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.cat((args[0], args[0])), *args[1:])

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        batches.append(len(args[0]))

    handles = [model.get_submodule(path).register_forward_pre_hook(double)]
    layers = [module for module in model.modules() if _forks(module)]
    handles += [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        # one image would broadcast anywhere
        output = forward_zeros(model, img_size, images=2)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False  # the halves of the network no longer fit together
    finally:
        for handle in handles:
            handle.remove()
    return isinstance(output, Tensor) and {*batches, len(output)} == {4}
