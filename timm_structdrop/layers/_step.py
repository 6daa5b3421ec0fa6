"""What a training step tells the layers of its model, and how a repeated forward hears it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Step", "StepAware", "is_recomputed"]


class Step(NamedTuple):
    """What a training task tells of the forward that is running.

    Attributes:
        forked: the batch is doubled on its way, sub model by sub model (R-Block).
        classes: what guides the layer, (B,) class indices or (B, K) class weights: the target, or
            the network's own prediction, as ``needs_classes`` asks; None if it asks for nothing.
        alpha: the classifier's weights of these classes, (B, C') float32; None unless
            ``needs_classifier``.
    """

    forked: bool = False
    classes: Tensor | None = None
    alpha: Tensor | None = None


NOTHING = Step()


class StepAware(nn.Module):
    """A module that a training task tells each :class:`Step` of its model.

    A task gives the step to the module for one forward and takes it back behind it. Gradient
    checkpointing runs parts of that forward again in the backward pass; the task then says which
    step the pass belongs to, by the number that autograd gives it, so that nothing has to be taken
    back when the pass is over, or if it is never over.

    Attributes:
        needs_classes: ``"target"``: the step's classes are the batch's target; ``"prediction"``:
            they are what the network predicts in eval mode; None: the layer needs none.
        needs_classifier: the layer reads ``alpha``, so the model must have a linear classifier.
    """

    needs_classes: str | None = None
    needs_classifier: ClassVar[bool] = False
    _running: Step = NOTHING
    _repeated: tuple[int, Step] = (-1, NOTHING)

    def begin_step(self, step: Step | None) -> None:
        """Tell the step of the coming forwards; None: they belong to none."""
        self._running = NOTHING if step is None else step

    def begin_backward(self, step: Step) -> None:
        """Tell, in a backward pass, the step of the forwards that are repeated in it."""
        self._repeated = (_backward_number(), step)

    def current_step(self) -> Step:
        """The step of the forward that is running or being repeated; an empty one if it has none.

        Under ``torch.compile`` no Python runs in a repetition.
        """
        if torch.compiler.is_compiling() or not is_recomputed():
            return self._running
        number, step = self._repeated
        return step if number == _backward_number() else NOTHING

    def __getstate__(self) -> Mapping[str, Any]:
        """A copy that is made in mid-step does not keep the batch's target."""
        return {**self.__dict__, "_running": NOTHING, "_repeated": (-1, NOTHING)}


def is_recomputed() -> bool:
    """Whether the forward that is running repeats one, for a backward pass; eager code only."""
    return _backward_number() != -1


def _backward_number() -> int:
    # what torch.utils.checkpoint asks for itself; -1 outside of backward passes
    number: int = torch._C._current_graph_task_id()
    return number
