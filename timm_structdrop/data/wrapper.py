"""Data sets around a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

__all__ = ["DatasetWrapper"]


class DatasetWrapper(Dataset):
    """A map-style data set around another one, as long as that unless a subclass says otherwise.

    ``transform`` is the one of the wrapped data set: timm's ``create_loader`` assigns it.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    @property
    def transform(self) -> Callable[[Any], Any] | None:
        """The transform of the wrapped data set."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Callable[[Any], Any] | None) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)
