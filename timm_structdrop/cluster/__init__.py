"""Clusters of the pixels of a layer's channels, and statistics of how clustered they are.

Pure functions on tensors; nothing here knows a layer or a model.
"""

from timm_structdrop.cluster._features import NotFiniteError
from timm_structdrop.cluster.agreement import adjusted_rand_index
from timm_structdrop.cluster.hopkins import hopkins, spatial_hopkins
from timm_structdrop.cluster.rena import ReNAResult, rena

__all__ = [
    "NotFiniteError",
    "ReNAResult",
    "adjusted_rand_index",
    "hopkins",
    "rena",
    "spatial_hopkins",
]
