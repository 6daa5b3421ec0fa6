"""Looking into a model: Hopkins reports, cluster maps, studies; numbers first, then pictures."""

from timm_structdrop.analysis.cams import (
    Cams,
    cam_place,
    class_activation_maps,
    compare_spread,
    draw_cams,
)
from timm_structdrop.analysis.cluster_study import ClusterStudy, cluster_study
from timm_structdrop.analysis.clusters import (
    ClusterMaps,
    TrainingMask,
    cluster_maps,
    draw_cluster_maps,
    draw_training_mask,
    training_mask,
)
from timm_structdrop.analysis.corruption_figures import draw_corruption_curves
from timm_structdrop.analysis.fitting import fit_clusters
from timm_structdrop.analysis.hopkins import (
    HopkinsReport,
    LayerHopkins,
    draw_hopkins_histograms,
    draw_hopkins_map,
    hopkins_report,
)
from timm_structdrop.analysis.maps import (
    LAYER_CHOICES,
    Place,
    cluster_layers,
    cluster_places,
    collect_maps,
    find_places,
)

__all__ = [
    "LAYER_CHOICES",
    "Cams",
    "ClusterMaps",
    "ClusterStudy",
    "HopkinsReport",
    "LayerHopkins",
    "Place",
    "TrainingMask",
    "cam_place",
    "class_activation_maps",
    "cluster_layers",
    "cluster_maps",
    "cluster_places",
    "cluster_study",
    "collect_maps",
    "compare_spread",
    "draw_cams",
    "draw_cluster_maps",
    "draw_corruption_curves",
    "draw_hopkins_histograms",
    "draw_hopkins_map",
    "draw_training_mask",
    "find_places",
    "fit_clusters",
    "hopkins_report",
    "training_mask",
]
