"""Structured dropout for timm: importing this package registers the model variants.

>>> import timm, timm_structdrop
>>> model = timm.create_model("resnet50_dropcluster", pretrained=True, drop_block_rate=0.1)
"""

from timm_structdrop.layers import regularizers
from timm_structdrop.models.placement import set_drop_prob
from timm_structdrop.models.structdrop_attached import attach, restore
from timm_structdrop.version import __version__

__all__ = ["__version__", "attach", "regularizers", "restore", "set_drop_prob"]
