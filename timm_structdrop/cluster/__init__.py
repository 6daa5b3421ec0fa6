"""Clusters of the pixels of a layer's channels, and statistics of how clustered they are.

Pure functions on tensors; nothing here knows a layer or a model.
"""

from .agreement import adjusted_rand_index
from .hopkins import hopkins, spatial_hopkins
from .rena import ReNAResult, rena

__all__ = ["ReNAResult", "adjusted_rand_index", "hopkins", "rena", "spatial_hopkins"]
