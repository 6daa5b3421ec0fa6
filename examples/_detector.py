"""torchvision's RetinaNet on a timm backbone, and what its DropBlock layers drop."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from timm_structdrop.errors import UserError
from timm_structdrop.models.placement import structdrop_layers

STRIDES = (8, 16, 32)


class PyramidBackbone(nn.Module):
    """A timm model with ``features_only`` under a feature pyramid, as torchvision's detectors want.

    timm returns a list of maps, torchvision takes an ``OrderedDict``. The maps are those at 1/8,
    1/16 and 1/32 of the image, and with ``coarse`` two more levels at 1/64 and 1/128 (P3 to P7).

    Raises:
        UserError: the model has no maps at these scales.
    """

    def __init__(self, features: Any, channels: int, coarse: bool) -> None:
        super().__init__()
        self.features = features
        widths = features.feature_info.channels()
        if tuple(features.feature_info.reduction()) != STRIDES:
            raise UserError(
                f"a backbone must have maps at 1/8, 1/16 and 1/32 of the image; "
                f"its maps are at 1/{', 1/'.join(map(str, features.feature_info.reduction()))}"
            )
        extra = LastLevelP6P7(channels, channels) if coarse else None
        self.fpn = FeaturePyramidNetwork(widths, channels, extra_blocks=extra)
        self.out_channels = channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.features(x)
        named = OrderedDict((f"p{3 + i}", level) for i, level in enumerate(maps))
        return self.fpn(named)


def retinanet(
    backbone: str,
    num_classes: int,
    *,
    img_size: int | tuple[int, int],
    channels: int = 256,
    coarse: bool = True,
    anchor_scale: int = 4,
    pretrained: bool = False,
    **settings: Any,
) -> RetinaNet:
    """RetinaNet with FPN on a backbone of timm or of this package.

    Args:
        backbone: e.g. ``resnet50_dropblock``; with a tag and ``pretrained``, its weights.
        num_classes: labels are 0 to num_classes - 1.
        img_size: shorter and longest side of the images, or both in one.
        channels: width of the pyramid and the heads.
        coarse: two more levels, for objects larger than 1/4 of some 500 pixels.
        anchor_scale: side of a level's smallest anchors, in its pixels; 4 is RetinaNet's.
        pretrained: the backbone's weights.
        settings: keywords of the backbone (``keep_prob``, ``block_size``, ...).

    Raises:
        UserError: the backbone is unknown or has no maps at the scales of the pyramid.
    """
    shorter, longest = (img_size, img_size) if isinstance(img_size, int) else img_size
    if not timm.is_model(backbone.split(".")[0]):
        raise UserError(f"--model must be a model timm knows; got {backbone!r}")
    try:
        features = timm.create_model(
            backbone, pretrained=pretrained, features_only=True, out_indices=(2, 3, 4), **settings
        )
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        raise UserError(f"{backbone} cannot be the backbone of a pyramid: {error}") from error
    body = PyramidBackbone(features, channels, coarse)
    strides = (*STRIDES, 64, 128) if coarse else STRIDES
    sizes = tuple(tuple(anchor_scale * s * 2 ** (i / 3) for i in range(3)) for s in strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return RetinaNet(
        body, num_classes, min_size=shorter, max_size=longest, anchor_generator=anchors
    )


@contextmanager
def measured_drops(model: nn.Module) -> Iterator[dict[str, float]]:
    """While open, counts what the structured layers drop; then fractions by layer and in all.

    Yields a dict that is filled when the context closes: of the units that were not 0 before a
    layer, the fraction that is 0 after it; the key ``all`` is over all layers.
    """
    counts: dict[str, list[int]] = {}
    fractions: dict[str, float] = {}
    handles = []
    names = {id(module): name for name, module in model.named_modules()}
    for layer in structdrop_layers(model):
        count = counts.setdefault(names[id(layer)], [0, 0])

        def watch(
            module: nn.Module, args: tuple[Tensor], output: Tensor, count: list[int] = count
        ) -> None:
            with torch.no_grad():
                alive = args[0] != 0
                count[0] += int((alive & (output == 0)).sum())
                count[1] += int(alive.sum())

        handles.append(layer.register_forward_hook(watch))
    try:
        yield fractions
    finally:
        for handle in handles:
            handle.remove()
        dropped = {name: lost / max(alive, 1) for name, (lost, alive) in counts.items()}
        lost, alive = (sum(count[i] for count in counts.values()) for i in (0, 1))
        fractions.update({**dropped, "all": lost / max(alive, 1)})
