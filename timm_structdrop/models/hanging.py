"""Layers that hang on modules by hooks, and how they stay when a module is made anew."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import timm.layers
import torch
from torch import nn

from timm_structdrop.errors import UserError
from timm_structdrop.layers.base import tell

__all__ = ["convert_sync_batchnorm", "hang"]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
COMPILED_TOO_EARLY = (
    "regularizers on norms do nothing in a model that is converted to SyncBatchNorm and compiled "
    "at once: let it run once in between, or convert it with "
    "timm_structdrop.models.hanging.convert_sync_batchnorm"
)


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """timm's ``convert_sync_batchnorm``, after which all layers on norms are hooked on again.

    Args:
        model: any model.

    Returns:
        The model with its batch norms exchanged; itself, unless it is a batch norm.
    """
    model = timm.layers.convert_sync_batchnorm(model)
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, partial) and hook.func is _look_after:
                hook(module, ())
    return model


def hang(model: nn.Module, path: str, name: str, layer: nn.Module, before: bool) -> None:
    """Make ``layer`` a child of a module, which calls it on its output, or ``before``: its input.

    A batch norm that is converted to SyncBatchNorm loses its hooks and keeps its children. The
    module around it therefore looks after it: it hooks the layer on again.

    Args:
        model: the model.
        path: the module's name in it.
        name: the child's name in the module.
        layer: what to hang there.
        before: call it on the module's input.
    """
    module = model.get_submodule(path)
    module.add_module(name, layer)
    _hook(module, name, before)
    if isinstance(module, nn.BatchNorm2d):
        around, inside = _runs_around(model, path)
        around.register_forward_pre_hook(partial(_look_after, inside, name, before))


def _hook(module: nn.Module, name: str, before: bool) -> None:
    if before:
        module.register_forward_pre_hook(partial(_call_child_before, name))
    else:
        module.register_forward_hook(partial(_call_child, name))


def _call_child_before(name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.get_submodule(name)(args[0]), *args[1:])


def _call_child(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return module.get_submodule(name)(output)


def _runs_around(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The innermost module around ``path`` whose own forward runs, and the path from there.

    The children of containers are often called one by one, by checkpointing for instance.
    """
    names = path.split(".")
    for n in range(len(names) - 1, 0, -1):
        around = model.get_submodule(".".join(names[:n]))
        if not isinstance(around, CONTAINERS):
            return around, ".".join(names[n:])
    return model, path


def _look_after(path: str, name: str, before: bool, module: nn.Module, args: Sequence[Any]) -> None:
    norm: Any = module
    for part in path.split("."):
        norm = getattr(norm, part, None)
    if not hasattr(norm, name):
        if module.training:
            raise UserError(
                f"a norm must keep its {name} layer in training; {path} of "
                f"{type(module).__name__}, now {type(norm).__name__}, was made anew without it: "
                "freeze or exchange norms first, then attach"
            )
    elif isinstance(norm, nn.SyncBatchNorm) and not _is_hooked(norm, name):
        if torch.compiler.is_compiling():  # compiled code does not see hooks come
            tell(COMPILED_TOO_EARLY)
        else:
            _hook(norm, name, before)


def _is_hooked(norm: nn.Module, name: str) -> bool:
    hooks = (*norm._forward_hooks.values(), *norm._forward_pre_hooks.values())
    return any(isinstance(hook, partial) and hook.args == (name,) for hook in hooks)
