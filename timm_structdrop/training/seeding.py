"""Where randomness in training comes from: pure functions of where the run stands.

No generator's state is ever saved. Whoever is about to use randomness seeds the generators from
the purpose and the position (seed, epoch, batch, rank), so a run that stopped continues with the
very numbers it would have drawn, in the middle of an epoch too and with any number of workers.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler

from timm_structdrop.errors import UserError

__all__ = ["SeededErasing", "derive_seed", "seed_everything", "set_loader_epoch", "starting_at"]


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


@contextmanager
def starting_at(loader: Any, batch: int) -> Iterator[int]:
    """Let a pass over a loader begin at a batch; those before it are not read.

    The order is a function of the seed and the epoch, so it is enough that the sampler leaves out
    its first indices. Call `set_loader_epoch` before, and make the pass inside the context.

    Args:
        loader: a torch ``DataLoader`` or timm's ``PrefetchLoader`` around one.
        batch: the first batch of the pass, at least 0.

    Yields:
        How many batches are left out: ``batch``, or 0 where the loader has to read them (a stream,
        or a batch sampler other than torch's).
    """
    inner = getattr(loader, "loader", loader)
    batches = getattr(inner, "batch_sampler", None)
    # torch gives a stream a batch sampler too, whose indices mean nothing
    if type(batches) is not BatchSampler or isinstance(inner.dataset, IterableDataset):
        yield 0
        return
    whole = batches.sampler
    batches.sampler = _Rest(whole, batch * batches.batch_size)
    erasing = getattr(loader, "random_erasing", None)
    if isinstance(erasing, SeededErasing):
        erasing.batch = batch
    try:
        yield batch
    finally:
        batches.sampler = whole


class _Rest:
    """The indices of a sampler without the first ones; as long as the whole, as a loader is."""

    def __init__(self, sampler: Any, first: int) -> None:
        self.sampler = sampler
        self.first = first

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.sampler), self.first, None)

    def __len__(self) -> int:
        return len(self.sampler)
