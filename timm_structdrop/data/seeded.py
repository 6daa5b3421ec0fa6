"""Samples that depend on nothing but the seed, the epoch, the rank and their index."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from timm_structdrop.data.wrapper import DatasetWrapper
from timm_structdrop.errors import UserError


def seed_sample(seed: int, epoch: int, rank: int, index: int) -> None:
    """Seed Python's, numpy's and torch's CPU generator for one sample.

    The generators of accelerators are left alone. All arguments are integers >= 0.
    """
    words = np.random.SeedSequence([seed, epoch, rank, index]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))


class SeededDataset(DatasetWrapper):
    """A map-style dataset whose sample i is a pure function of (seed, epoch, rank, i).

    It is the same with any number of workers, persistent or not, in any order of access: the
    generators are seeded in front of every sample, and the epoch lies in shared memory, where
    running workers see `set_epoch`. The generators stay where the sample left them, so what
    a collate function draws (timm's `FastCollateMixup`) is a function of the batch's last sample.
    """

    def __init__(self, dataset: Any, seed: int, rank: int = 0) -> None:
        if isinstance(dataset, IterableDataset):
            raise TypeError(f"a seeded dataset must be map-style; got {type(dataset).__name__}")
        for name, value in (("seed", seed), ("rank", rank)):
            if value < 0:
                raise UserError(f"{name} must be at least 0; got {value}")
        super().__init__(dataset)
        self.seed = seed
        self.rank = rank
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the samples from the next loader iteration on."""
        if epoch < 0:
            raise UserError(f"epoch must be at least 0; got {epoch}")
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """The epoch of the samples, counted from 0."""
        return int(self._epoch)

    def __getitem__(self, index: int) -> Any:
        seed_sample(self.seed, self.epoch, self.rank, index)
        return self.dataset[index]
