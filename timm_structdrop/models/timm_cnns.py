"""Other timm CNNs that are registered with DropBlock; ``attach`` reaches all the rest.

ConvNeXt, EfficientNet, RegNet and DenseNet take DropBlock where the paper has it in a ResNet: after
every convolution of the stages at 1/16 and 1/32, in ConvNeXt and RegNet on the skips as well (those
of the others are no modules), gamma / 4 in the first of them.
NASNet-A stands in for the paper's AmoebaNet-B, the nearest network timm has (Section 4.1.2).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import model_entrypoint
from torch import nn

from timm_structdrop.models.architectures import register_architecture

__all__ = ["late_cell_norms"]


def late_cell_norms(model: nn.Module) -> dict[str, Any]:
    """AmoebaNet's placement: after all batch norms of the last half of the cells, block size 11.

    The skips of a NASNet cell carry the outputs of batch norms at its entrance, so they drop too.
    """
    cells = [name for name, _ in model.named_children() if "cell" in name and "stem" not in name]
    late = tuple(f"{cell}." for cell in cells[len(cells) // 2 :])
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and name.startswith(late)
    ]
    return {"modules": norms, "block_size": 11}


def _plain(name: str, **kwargs: Any) -> nn.Module:
    return model_entrypoint(name)(pretrained=False, **kwargs)


for _name, _features in (
    ("convnext_tiny", 4),
    ("efficientnet_b0", 5),
    ("regnety_032", 5),
    ("densenet121", 5),
    ("nasnetalarge", 5),
):
    register_architecture(
        _name,
        partial(_plain, _name),
        timm_name=_name,
        summary=f"timm's {_name}",
        out_indices=tuple(range(_features)),
        regularizers=("dropblock",),
        placements={"dropblock": late_cell_norms} if _name == "nasnetalarge" else None,
        feature_cls="getter",
        residual=_name in ("convnext_tiny", "efficientnet_b0", "regnety_032"),
    )
