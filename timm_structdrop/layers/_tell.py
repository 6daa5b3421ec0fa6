"""Warnings of layers that are used without what they need, also from compiled code."""

from __future__ import annotations

import warnings

import torch

__all__ = ["tell"]


@torch.compiler.assume_constant_result
def tell(message: str) -> None:
    """Warn with ``message``, which Python shows once unless its filters say otherwise.

    ``torch.compile`` runs this function while it traces the layer and leaves nothing of it in the
    graph: the warning comes once for each layer and graph, neither breaks the graph nor compiles
    again. A layer that remembered there that it has warned would be compiled twice.
    """
    warnings.warn(message, stacklevel=3)
