"""One forward pass of an unknown CNN, watched: which modules ran, in what order, on what maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from timm_structdrop.errors import UserError
from timm_structdrop.layers import Fork, StructDropLayer
from timm_structdrop.models.modes import eval_mode

__all__ = ["NORMS", "Step", "first_conv", "forward_zeros", "map_shape", "trace"]

NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Step:
    """One module call of the watched forward pass.

    Attributes:
        path: the module's name in the model.
        module: the module.
        shape: (C, H, W) of its output, None where the output is not a (B, C, H, W) tensor.
        leaf: it is not looked into: it has no children but ours, or is a normalisation
            (timm's carry their activation as a child).
        chained: its input is the output of the leaf before, unchanged (no addition in between).
    """

    path: str
    module: nn.Module
    shape: tuple[int, int, int] | None
    leaf: bool
    chained: bool


class _Stop(Exception):
    """Ends the watched pass early."""


def first_conv(model: nn.Module) -> nn.Conv2d:
    """The first convolution of the model in the order of its definition.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module
    raise UserError(
        f"a structured regularizer needs a CNN; {type(model).__name__} has no nn.Conv2d"
    )


def trace(
    model: nn.Module, img_size: tuple[int, int], until: Callable[[list[Step]], bool] | None = None
) -> list[Step]:
    """The module calls of one eval forward of a zero image, in the order in which they finish.

    Args:
        model: any CNN; its training flags and hooks are as before afterwards.
        img_size: (H, W) of the image.
        until: called after each step; True ends the pass there.
    """
    steps: list[Step] = []
    last: list[tuple[Tensor, int]] = []

    def watch(path: str, leaf: bool, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        is_map = isinstance(output, Tensor) and output.ndim == 4
        chained = bool(last and args and args[0] is last[0][0] and seen.get(path) == last[0][1])
        shape = (output.shape[1], output.shape[2], output.shape[3]) if is_map else None
        steps.append(Step(path, module, shape, leaf, chained))
        if leaf:
            last[:] = [(output, output._version)] if isinstance(output, Tensor) else []
        if until is not None and until(steps):
            raise _Stop

    seen: dict[str, int] = {}

    def enter(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen[path] = args[0]._version  # an in-place activation changes it before `watch` runs

    handles = []
    modules = dict(model.named_modules())
    for path, module in modules.items():
        inside = isinstance(modules.get(path.rpartition(".")[0]), NORMS)
        if path and not inside and not isinstance(module, StructDropLayer | Fork):
            leaf = isinstance(module, NORMS) or all(
                isinstance(child, StructDropLayer | Fork) for child in module.children()
            )
            handles.append(module.register_forward_pre_hook(partial(enter, path)))
            handles.append(module.register_forward_hook(partial(watch, path, leaf)))
    try:
        forward_zeros(model, img_size)
    finally:
        for handle in handles:
            handle.remove()
    return steps


def map_shape(
    model: nn.Module, path: str, img_size: tuple[int, int], before: bool = False
) -> tuple[int, int, int]:
    """(C, H, W) of the output of module ``path``, or ``before`` it: of its input.

    Raises:
        UserError: the module does not run, or does not return a (B, C, H, W) tensor.
    """
    shapes: list[tuple[int, int, int]] = []

    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = args[0] if before else output
        if isinstance(found, Tensor) and found.ndim == 4:
            shapes.append((found.shape[1], found.shape[2], found.shape[3]))
        raise _Stop

    module = dict(model.named_modules()).get(path)
    if module is not None:
        handle = module.register_forward_hook(watch)
        try:
            forward_zeros(model, img_size)
        finally:
            handle.remove()
    if not shapes:
        raise UserError(
            f"a regularizer that keeps state needs a (B, C, H, W) map; module {path!r} has none"
        )
    return shapes[0]


def forward_zeros(model: nn.Module, img_size: tuple[int, int], images: int = 1) -> Any:
    """One eval forward without gradients of zero images, as many as ``images``.

    A hook may end it with :class:`_Stop`; the training flags are as before afterwards.

    Returns:
        The output of the model; None where a hook ended the pass.
    """
    conv = first_conv(model)
    zeros = torch.zeros(
        images, conv.in_channels, *img_size, device=conv.weight.device, dtype=conv.weight.dtype
    )
    try:
        with eval_mode(model), torch.no_grad():
            return model(zeros)
    except _Stop:
        return None
