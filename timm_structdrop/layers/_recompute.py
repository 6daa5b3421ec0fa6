"""Telling a forward from its repetition by gradient checkpointing."""

from __future__ import annotations

import torch

__all__ = ["is_recomputed"]


def is_recomputed() -> bool:
    """Whether the forward that is running repeats one, for a backward pass; eager code only."""
    # what torch.utils.checkpoint asks for itself
    return torch._C._current_graph_task_id() != -1
