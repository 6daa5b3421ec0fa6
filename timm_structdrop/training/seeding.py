"""Where randomness in training comes from: pure functions of where the run stands.

No generator's state is ever saved. Whoever is about to use randomness seeds the generators from
the purpose and the position (seed, epoch, batch, rank), so a run that stopped continues with the
very numbers it would have drawn, in the middle of an epoch too and with any number of workers.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from timm_structdrop.errors import UserError

__all__ = ["SeededErasing", "derive_seed", "seed_everything", "set_loader_epoch"]


def derive_seed(purpose: str, *numbers: int) -> int:
    """A seed in [0, 2^63), hashed from a purpose and any non-negative integers.

    Hashing (numpy's ``SeedSequence``) keeps neighbouring positions unrelated, which adding seed,
    epoch and rank does not: (seed 1, rank 0) and (seed 0, rank 1) would draw the same numbers.

    Raises:
        UserError: a number is negative.
    """
    if any(number < 0 for number in numbers):
        raise UserError(f"seeds, epochs, batches and ranks must be at least 0; got {numbers}")
    entropy = [zlib.crc32(purpose.encode()), *numbers]
    word = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return int(word) >> 1


def seed_everything(purpose: str, *numbers: int) -> None:
    """Seed Python's ``random``, numpy and torch (CPU and every accelerator) from a position."""
    seed = derive_seed(purpose, *numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class SeededErasing:
    """timm's random erasing of whole batches, seeded by (seed, epoch, batch, rank).

    timm's ``PrefetchLoader`` erases in the main process, one batch ahead of the training step, so
    its random numbers would depend on what was drawn there in between.
    """

    def __init__(self, erasing: Callable[[Tensor], Tensor], seed: int, rank: int) -> None:
        self.erasing = erasing
        self.seed = seed
        self.rank = rank
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Choose the epoch of the batches to come, counted from 0."""
        self.epoch = epoch
        self.batch = 0

    def __call__(self, images: Tensor) -> Tensor:
        seed_everything("erase", self.seed, self.epoch, self.batch, self.rank)
        self.batch += 1
        return self.erasing(images)


def set_loader_epoch(loader: Any, seed: int, epoch: int, rank: int = 0) -> None:
    """Make the order and the augmentation of a loader's next pass a function of (seed, epoch).

    Data sets and distributed samplers are told the epoch. A ``RandomSampler`` gets a generator of
    its own, because the global one is used before or after other things depending on the number
    of workers. The augmentation of each sample is ``SeededDataset``'s business.

    Args:
        loader: a torch ``DataLoader`` or timm's ``PrefetchLoader`` around one.
        seed: the run's seed.
        epoch: the epoch about to start, at least 0.
        rank: this process of a distributed run.
    """
    sampler, dataset = loader.sampler, loader.dataset
    for part in (dataset, sampler):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
    if isinstance(sampler, RandomSampler):
        sampler.generator = torch.Generator().manual_seed(derive_seed("order", seed, epoch))
    erasing = getattr(loader, "random_erasing", None)
    if erasing is not None:
        if not isinstance(erasing, SeededErasing):
            loader.random_erasing = erasing = SeededErasing(erasing, seed, rank)
        erasing.begin_epoch(epoch)
    seed_everything("epoch", seed, epoch, rank)
