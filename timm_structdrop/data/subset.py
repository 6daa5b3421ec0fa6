"""Class-balanced subsets: the same share of every class, larger ones holding the smaller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from timm_structdrop.data.wrapper import DatasetWrapper
from timm_structdrop.errors import UserError

__all__ = ["Subset", "balanced_indices", "balanced_subset", "class_indices"]


def balanced_indices(targets: Sequence[int], share: float, seed: int) -> np.ndarray:
    """Indices, ascending, of a share of every class.

    Each class is put into a random order that depends on nothing but the seed, the class and its
    size; its first round(share n) samples, at least 1, are taken. So the subsets of one seed are
    nested: 10 % lies inside 20 %.

    Args:
        targets: the class of each sample.
        share: in (0, 1].
        seed: an integer >= 0.

    Raises:
        UserError: ``share`` or ``seed`` is out of range.
    """
    if not 0.0 < share <= 1.0:
        raise UserError(f"train_fraction must be in (0, 1]; got {share}")
    if seed < 0:
        raise UserError(f"train_fraction_seed must be at least 0; got {seed}")
    labels = np.asarray(targets)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        # labels can be negative where a set has unlabelled samples; seeds cannot
        generator = np.random.default_rng([seed, int(label) & 0xFFFFFFFF])
        count = max(1, int(share * len(members) + 0.5))
        chosen.append(generator.permutation(members)[:count])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=int)


def class_indices(dataset: Any) -> list[int]:
    """The class of each sample of a map-style dataset: from the labels that it or its reader keeps,
    else from every sample, without its transform."""
    source = dataset
    while source is not None:
        for keeper in (source, getattr(source, "reader", None)):
            labels = _kept_labels(keeper, len(dataset))
            if labels is not None:
                return labels
        source = getattr(source, "dataset", None)
    transform, dataset.transform = dataset.transform, None
    try:
        return [int(dataset[index][1]) for index in range(len(dataset))]
    finally:
        dataset.transform = transform


def _kept_labels(keeper: Any, length: int) -> list[int] | None:
    """``targets`` of torchvision's data sets and of timm's reader of tar files, or the second
    entries of ``samples`` of its reader of folders."""
    labels = getattr(keeper, "targets", None)
    if labels is None:
        samples = getattr(keeper, "samples", None) or []
        labels = [sample[1] for sample in samples if isinstance(sample, tuple)]
    labels = np.asarray(labels)
    return labels.tolist() if labels.shape == (length,) and labels.dtype.kind in "iu" else None


class Subset(DatasetWrapper):
    """Samples of a map-style dataset."""

    def __init__(self, dataset: Any, indices: np.ndarray) -> None:
        super().__init__(dataset)
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.dataset[int(self.indices[index])]


def balanced_subset(dataset: Any, share: float, seed: int) -> Any:
    """A class-balanced share of ``dataset``, see `balanced_indices`.

    Raises:
        UserError: the dataset is iterable-style, or ``share`` or ``seed`` is out of range.
    """
    if isinstance(dataset, IterableDataset):
        raise UserError(
            f"train_fraction needs a map-style data set; got {type(dataset).__name__} "
            "(--train-num-samples takes the first samples)"
        )
    return Subset(dataset, balanced_indices(class_indices(dataset), share, seed))
