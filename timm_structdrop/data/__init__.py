"""Data: the embedded digits, Tiny ImageNet, timm's data sets with clear errors, class-balanced
subsets, and reproducible sampling."""

from timm_structdrop.data.augment import own_size_transforms
from timm_structdrop.data.digits import DigitsDataset
from timm_structdrop.data.factory import class_names, create_dataset, dataset_names
from timm_structdrop.data.seeded import SeededDataset
from timm_structdrop.data.subset import balanced_indices, balanced_subset
from timm_structdrop.data.tiny_imagenet import TinyImageNet

__all__ = [
    "DigitsDataset",
    "SeededDataset",
    "TinyImageNet",
    "balanced_indices",
    "balanced_subset",
    "class_names",
    "create_dataset",
    "dataset_names",
    "own_size_transforms",
]
