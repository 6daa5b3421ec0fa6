"""The ImageNet ResNets: timm's classes and parameter names, so that timm's weights load."""

from __future__ import annotations

from functools import partial

from timm.models import BasicBlock, Bottleneck, ResNet

from timm_structdrop.models.architectures import register_architecture

for _name, _block, _layers in (
    ("resnet18", BasicBlock, (2, 2, 2, 2)),
    ("resnet34", BasicBlock, (3, 4, 6, 3)),
    ("resnet50", Bottleneck, (3, 4, 6, 3)),
    ("resnet101", Bottleneck, (3, 4, 23, 3)),
    ("resnet152", Bottleneck, (3, 8, 36, 3)),
):
    register_architecture(
        _name,
        partial(ResNet, block=_block, layers=_layers),
        timm_name=_name,
        summary=f"timm's {_name}: 7x7 stride-2 stem and max-pool",
        residual=True,
    )
