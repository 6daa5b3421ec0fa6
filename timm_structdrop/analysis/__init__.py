"""Looking into a model: Hopkins reports, cluster maps, studies; numbers first, then pictures."""

from timm_structdrop.analysis.cluster_figures import draw_cluster_maps, draw_training_mask
from timm_structdrop.analysis.cluster_maps import (
    ClusterMaps,
    TrainingMask,
    cluster_maps,
    training_mask,
)
from timm_structdrop.analysis.cluster_study import ClusterStudy, cluster_study
from timm_structdrop.analysis.files import output_folder, save_csv, save_json, save_png
from timm_structdrop.analysis.fitting import fit_clusters
from timm_structdrop.analysis.hopkins_figures import draw_hopkins_histograms, draw_hopkins_map
from timm_structdrop.analysis.hopkins_report import HopkinsReport, LayerHopkins, hopkins_report
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
    "ClusterMaps",
    "ClusterStudy",
    "HopkinsReport",
    "LayerHopkins",
    "Place",
    "TrainingMask",
    "cluster_layers",
    "cluster_maps",
    "cluster_places",
    "cluster_study",
    "collect_maps",
    "draw_cluster_maps",
    "draw_hopkins_histograms",
    "draw_hopkins_map",
    "draw_training_mask",
    "find_places",
    "fit_clusters",
    "hopkins_report",
    "output_folder",
    "save_csv",
    "save_json",
    "save_png",
    "training_mask",
]
