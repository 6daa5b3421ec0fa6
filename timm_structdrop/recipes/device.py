"""Where to compute, from the flags of every command."""

from __future__ import annotations

import argparse

import torch
from timm.layers import set_fast_norm

from timm_structdrop.errors import UserError, nearest
from timm_structdrop.words import counted

__all__ = ["check_compile_backend", "chosen_device", "make_fast"]


def chosen_device(name: str | None) -> torch.device:
    """The device of ``--device``; the first GPU, else the CPU, if it is not given.

    Raises:
        UserError: torch does not know it, or does not see it.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device must be one that torch knows; got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = counted(torch.cuda.device_count(), "GPU")
        raise UserError(f"--device must be available; got {name!r}, and torch sees {seen}")
    return device


def make_fast(flags: argparse.Namespace, device: torch.device) -> None:
    """Process-wide settings for the device: TF32 and cuDNN's search on GPUs, ``--fast-norm``."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if flags.fast_norm:
        set_fast_norm()


def check_compile_backend(name: str | None) -> None:
    """Raise UserError for a ``--torchcompile`` that torch.compile does not have."""
    backends = torch.compiler.list_backends(exclude_tags=()) if name else []
    if name and name not in backends:
        raise UserError(f"unknown torch.compile backend {name!r}{nearest(name, backends)}")
