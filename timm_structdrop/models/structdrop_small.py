"""The small architectures as timm models under their own names, without a regularizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from timm_structdrop.models.architectures import Architecture, architectures

_SMALL = [architecture for architecture in architectures.values() if not architecture.timm_name]

__all__ = [architecture.name for architecture in _SMALL]

default_cfgs = generate_default_cfgs(
    {
        name: cfg
        for architecture in _SMALL
        for name, cfg in architecture.default_cfgs(architecture.name).items()
    }
)


def _entrypoint(architecture: Architecture) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            architecture.constructor,
            architecture.name,
            pretrained,
            feature_cfg={"out_indices": architecture.out_indices},
            **kwargs,
        )

    build.__name__ = build.__qualname__ = architecture.name
    build.__doc__ = architecture.summary
    return register_model(build)


for _architecture in _SMALL:
    globals()[_architecture.name] = _entrypoint(_architecture)
