"""The regularizers: one file each, a pure function of tensors and a thin module around it."""

from timm_structdrop.layers._base import StructDropLayer
from timm_structdrop.layers._registry import Regularizer, register, regularizers
from timm_structdrop.layers.dropcluster import DropCluster2d, drop_cluster_2d

__all__ = [
    "DropCluster2d",
    "Regularizer",
    "StructDropLayer",
    "drop_cluster_2d",
    "register",
    "regularizers",
]
