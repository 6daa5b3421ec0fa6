"""The regularizers: one file each, a pure function of tensors and a thin module around it."""

from timm_structdrop.layers.base import (
    FittedLayer,
    Paper,
    Placement,
    Regularizer,
    Step,
    StepAware,
    StructDropLayer,
    register,
    regularizers,
)
from timm_structdrop.layers.blocks import seed_rate
from timm_structdrop.layers.camdrop import CamDrop2d, cam_drop_2d
from timm_structdrop.layers.dropblock import DropBlock2d, drop_block_2d
from timm_structdrop.layers.dropcluster import DropCluster2d, drop_cluster_2d
from timm_structdrop.layers.dropout import UnitDropout2d, unit_dropout_2d
from timm_structdrop.layers.rblock import (
    HEAD_SUB_MODELS,
    SUB_MODELS,
    Fork,
    RBlock2d,
    r_block_2d,
)
from timm_structdrop.layers.spatialdropout import SpatialDropout2d, spatial_dropout_2d
from timm_structdrop.layers.stochasticdepth import StochasticDepth, stochastic_depth

__all__ = [
    "HEAD_SUB_MODELS",
    "SUB_MODELS",
    "CamDrop2d",
    "DropBlock2d",
    "DropCluster2d",
    "FittedLayer",
    "Fork",
    "Paper",
    "Placement",
    "RBlock2d",
    "Regularizer",
    "SpatialDropout2d",
    "Step",
    "StepAware",
    "StochasticDepth",
    "StructDropLayer",
    "UnitDropout2d",
    "cam_drop_2d",
    "drop_block_2d",
    "drop_cluster_2d",
    "r_block_2d",
    "register",
    "regularizers",
    "seed_rate",
    "spatial_dropout_2d",
    "stochastic_depth",
    "unit_dropout_2d",
]
