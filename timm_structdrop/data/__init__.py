"""Data: the embedded digits, timm's data sets with clear errors, and reproducible sampling."""

from timm_structdrop.data.augment import own_size_transforms
from timm_structdrop.data.digits import DigitsDataset
from timm_structdrop.data.factory import class_names, create_dataset, dataset_names
from timm_structdrop.data.seeded import SeededDataset

__all__ = [
    "DigitsDataset",
    "SeededDataset",
    "class_names",
    "create_dataset",
    "dataset_names",
    "own_size_transforms",
]
