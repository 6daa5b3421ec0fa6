"""Train and eval mode, for a while."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["eval_mode"]


@contextmanager
def eval_mode(model: nn.Module, active: Collection[nn.Module] = ()) -> Iterator[None]:
    """Eval mode of ``model``, except for the modules ``active``; flags are restored on exit."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in active:
        module.train()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
