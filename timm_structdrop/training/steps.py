"""What a training step tells the layers of its model: the classes that guide them, a fork."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from timm_structdrop.errors import UserError
from timm_structdrop.layers import Step, StepAware
from timm_structdrop.models.modes import eval_mode

__all__ = [
    "Told",
    "classifier_weight",
    "predicted_classes",
    "repeat_in_backward",
    "target_weights",
    "tell_step",
]

Told = list[tuple[StepAware, Step]]


@contextmanager
def tell_step(
    model: nn.Module,
    target: Tensor | None = None,
    prediction: Tensor | None = None,
    batch: int = 0,
    forked: bool = False,
) -> Iterator[Told]:
    """Forwards of ``model`` inside the context belong to one step; it is taken back behind them.

    Args:
        model: with its layers, wrapped for compilation or distributed training or not.
        target: what the batch shows, for the layers that need it; see :func:`target_weights`.
        prediction: class indices (B,) that the network predicts, for the layers that need those.
        batch: B.
        forked: the batch is doubled on its way.

    Yields:
        What was told to whom, for :func:`repeat_in_backward`.
    """
    model = unwrap_model(model)
    told: Told = []
    steps: dict[tuple[str | None, bool], Step] = {}
    for module in model.modules():
        if not isinstance(module, StepAware):
            continue
        key = (module.needs_classes, module.needs_classifier)
        if key not in steps:
            needed = {"target": target, "prediction": prediction}
            classes = None if module.needs_classes is None else needed[module.needs_classes]
            alpha = None
            if classes is not None and module.needs_classifier:
                alpha = target_weights(classifier_weight(model), classes, batch)
            steps[key] = Step(forked, classes, alpha)
        told.append((module, steps[key]))
    try:
        for module, step in told:
            module.begin_step(step)
        yield told
    finally:
        for module, _ in told:
            module.begin_step(None)


def repeat_in_backward(told: Told, results: Sequence[Tensor]) -> None:
    """Forwards that gradient checkpointing repeats in a backward pass hear the step again.

    Args:
        told: of :func:`tell_step`.
        results: tensors from which a backward pass may start. Two results of two steps need a
            ``backward()`` each: in a joint one both are repeated as the same step.
    """

    def begin_backward(gradient: Tensor) -> None:
        for module, step in told:
            module.begin_backward(step)

    for result in results:
        if result.requires_grad:
            result.register_hook(begin_backward)


@torch.no_grad()
def predicted_classes(model: nn.Module, images: Tensor) -> Tensor:
    """The classes (B,) that a network predicts, by one forward in eval mode.

    Args:
        model: wrapped or not; the layers of distributed training have no part in the forward.
        images: (B, C, H, W).
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    kind = images.device.type
    with (
        eval_mode(model),
        # weights that autocast rounds without gradients must not serve the step that follows
        torch.autocast(
            kind,
            enabled=torch.is_autocast_enabled(kind),
            dtype=torch.get_autocast_dtype(kind),
            cache_enabled=False,
        ),
    ):
        classes: Tensor = model(images).argmax(1)
    return classes


def classifier_weight(model: nn.Module) -> Tensor:
    """The weights (classes, features) of a model's linear classifier, detached.

    Raises:
        UserError: ``model.get_classifier()`` is not an ``nn.Linear`` or a 1x1 ``nn.Conv2d``.
    """
    get_classifier = getattr(model, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else None
    if isinstance(classifier, nn.Linear):
        return classifier.weight.detach()
    if isinstance(classifier, nn.Conv2d) and classifier.weight.shape[2:] == (1, 1):
        return classifier.weight.detach().flatten(1)
    raise UserError(
        "CamDrop guided by a class needs a model whose get_classifier() is an nn.Linear or a 1x1 "
        f"nn.Conv2d; {type(model).__name__} has {_name_of(classifier, callable(get_classifier))}"
    )


def target_weights(weight: Tensor, target: Tensor, batch: int) -> Tensor:
    """alpha: the classifier's row of each sample's class, or the mean weighted by its target.

    Values out of range are found on a CPU only: to look at them on a GPU is to wait for it.

    Args:
        weight: (K, C'), classes and features.
        target: class indices (B,) in [0, K), or a weight in [0, 1] for each class (B, K), as mixup,
            cutmix and label smoothing make them.
        batch: B.

    Returns:
        (B, C') float32.

    Raises:
        UserError: ``target`` has another shape or dtype, or a value out of its range.
    """
    classes = weight.shape[0]
    soft = target.ndim == 2
    shape: Sequence[int] = (batch, classes) if soft else (batch,)
    if tuple(target.shape) != tuple(shape) or (target.is_floating_point() and not soft):
        raise UserError(
            f"a target must be class indices (B,) or class weights (B, K) with B = {batch} and "
            f"K = {classes}; got {target.dtype} {tuple(target.shape)}"
        )
    if target.device.type == "cpu" and target.numel():
        low, high = target.min().item(), target.max().item()
        bound = 1 if soft else classes - 1
        if not (low >= 0 and high <= bound):
            raise UserError(
                f"a target must be {'weights in [0, 1]' if soft else f'classes in [0, {bound}]'}; "
                f"got values from {low} to {high}"
            )
    weight = weight.detach().float()
    if not soft:
        return weight.index_select(0, target.long())
    with torch.autocast(weight.device.type, enabled=False):
        return target.detach().float() @ weight


def _name_of(classifier: object, has_method: bool) -> str:
    if not has_method:
        return "no get_classifier"
    if isinstance(classifier, nn.Module):
        return repr(classifier)[:80]
    return f"one of type {type(classifier).__name__}"
