"""How a batch's target reaches the layers that it guides (CamDrop)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from timm_structdrop.errors import UserError
from timm_structdrop.layers import CamDrop2d
from timm_structdrop.models.placement import structdrop_layers

__all__ = ["TargetGuide", "classifier_weight", "target_weights"]


class TargetGuide:
    """Gives the layers of one model that need it each batch's row of classifier weights.

    A layer has it during the forward of its batch, and again during the backward, where gradient
    checkpointing runs forwards; it is taken back when the forward ends, whatever is raised in it,
    and when all gradients have arrived, or at the next step if they never do. Two losses of a
    checkpointed model need a ``backward()`` each: in a joint one, both get the weights of one.

    Args:
        model: the model with its layers, wrapped for compilation or distributed training or not.

    Raises:
        UserError: a layer needs targets and the model has no linear classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap_model(model)
        layers = (layer for layer in structdrop_layers(self.model) if layer.needs_target)
        self.layers = [layer for layer in layers if isinstance(layer, CamDrop2d)]
        self._parameters_done: torch.utils.hooks.RemovableHandle | None = None
        if self.layers:
            classifier_weight(self.model)

    @contextmanager
    def given(self, target: Tensor, batch: int) -> Iterator[Tensor]:
        """Forwards inside the context are guided by ``target``; see :func:`target_weights`."""
        alpha = target_weights(classifier_weight(self.model), target, batch)
        self._set(alpha)
        try:
            yield alpha
        finally:
            self._set(None)

    def recall(self, alpha: Tensor, loss: Tensor) -> None:
        """Give the weights back to the layers while the backward pass of ``loss`` runs."""
        if loss.requires_grad:
            loss.register_hook(lambda grad: self._begin_backward(alpha))

    def _begin_backward(self, alpha: Tensor) -> None:
        self._set(alpha)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._parameters_done = register_multi_grad_hook(
            parameters, lambda gradients: self._set(None)
        )

    def _set(self, alpha: Tensor | None) -> None:
        if self._parameters_done is not None:
            self._parameters_done.remove()
            self._parameters_done = None
        for layer in self.layers:
            layer.set_cam(alpha)


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
        "CamDrop with guide='cam' needs a model whose get_classifier() is an nn.Linear or a 1x1 "
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
