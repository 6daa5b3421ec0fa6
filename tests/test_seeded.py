"""The same (seed, epoch, rank, index) is the same sample, whoever loads it and however."""

import random
from multiprocessing.reduction import ForkingPickler
from unittest.mock import patch

import numpy as np
import pytest
import torch
from timm.data import AugMixDataset, FastCollateMixup, create_loader
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
)

from timm_structdrop.data import SeededDataset, create_dataset
from timm_structdrop.training import set_loader_epoch
from timm_structdrop.training.seeding import starting_at


class Noise(Dataset):
    """Draws from all three generators."""

    transform = None

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        draws = [index, random.random(), np.random.random(), torch.rand(()).item()]
        return torch.tensor(draws, dtype=torch.float64)


def loaded(dataset: SeededDataset, epochs: list[int], **settings: object) -> list[torch.Tensor]:
    loader = DataLoader(dataset, batch_size=4, **settings)
    passes = []
    for epoch in epochs:
        dataset.set_epoch(epoch)
        batches = torch.cat(list(loader))
        passes.append(batches[batches[:, 0].argsort()])
    return passes


def alone(seed: int, epoch: int, rank: int = 0) -> torch.Tensor:
    """The oracle: every sample drawn by itself, in reverse, from a dataset of its own."""
    rows = []
    for index in reversed(range(12)):
        dataset = SeededDataset(Noise(), seed, rank)
        dataset.set_epoch(epoch)
        rows.append(dataset[index])
    return torch.stack(rows[::-1])


@pytest.mark.parametrize(
    "settings",
    [
        {"num_workers": 0},
        {"num_workers": 0, "shuffle": True},
        {"num_workers": 1},
        {"num_workers": 2, "shuffle": True},
        {"num_workers": 2, "persistent_workers": True},
    ],
    ids=str,
)
def test_loading_changes_nothing(settings):
    first, second, third = loaded(SeededDataset(Noise(), 7), [3, 0, 3], **settings)
    assert torch.equal(first, alone(7, 3)) and torch.equal(third, alone(7, 3))
    assert torch.equal(second, alone(7, 0))


def test_a_dataset_sent_to_a_spawned_worker_shares_its_epoch():
    dataset = SeededDataset(Noise(), 7)
    sent = ForkingPickler.loads(ForkingPickler.dumps(dataset))
    dataset.set_epoch(5)
    assert sent.epoch == 5
    assert torch.equal(sent[2], alone(7, 5)[2])


def test_every_number_of_the_position_matters():
    base = alone(7, 3, 0)[:, 1:]
    for other in (alone(8, 3, 0), alone(7, 4, 0), alone(7, 3, 1)):
        assert (base != other[:, 1:]).all()
    assert (alone(8, 3)[:, 1:] != alone(7, 4)[:, 1:]).all()
    assert len(base.flatten().unique()) == base.numel()


def test_what_a_sample_draws_is_uniform_over_epochs():
    dataset, draws = SeededDataset(Noise(), 0), []
    for epoch in range(300):
        dataset.set_epoch(epoch)
        draws.append(torch.stack([dataset[0], dataset[1]])[:, 1:].flatten())
    columns = torch.stack(draws).T
    # Standard error of a uniform mean over 300: 0.0167; of a correlation: 0.058.
    assert (columns.mean(1) - 0.5).abs().max() < 4 * 0.0167
    assert (torch.corrcoef(columns) - torch.eye(len(columns))).abs().max() < 4.5 * 0.058


def digits_batches(workers: int, augmix: bool = False, mixup: bool = False) -> torch.Tensor:
    dataset = create_dataset("digits", input_img_mode="L", shift=1, rotation=10)
    digits = dataset.dataset
    digits.targets = digits.targets[:96]
    dataset = AugMixDataset(dataset, num_splits=2) if augmix else dataset
    seeded = SeededDataset(dataset, seed=1)
    loader = create_loader(
        seeded,
        input_size=(1, 16, 16),
        batch_size=32,
        is_training=True,
        no_aug=False,
        scale=(0.5, 1.0),
        auto_augment="augmix-m5-w2" if augmix else None,
        num_aug_splits=2 if augmix else 0,
        mean=(0.5,),
        std=(0.5,),
        num_workers=workers,
        collate_fn=FastCollateMixup(num_classes=10) if mixup else None,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    loader.sampler.generator = torch.Generator().manual_seed(0)
    seeded.set_epoch(2)
    torch.manual_seed(99)
    return torch.cat([part.flatten().float() for batch in loader for part in batch])


@pytest.mark.parametrize("settings", [{}, {"mixup": True}, {"augmix": True}], ids=str)
def test_timms_loader_gives_the_same_batches_with_any_number_of_workers(settings):
    assert torch.equal(digits_batches(0, **settings), digits_batches(2, **settings))


class Counted(Dataset):
    """Counts what is read from a data set, in workers too."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.reads = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def transform(self):
        return self.dataset.transform

    @transform.setter
    def transform(self, transform) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        self.reads += 1
        return self.dataset[index]


def counted_loader(workers: int, sampler: str, prefetcher: bool, persistent: bool):
    """Digits with every augmentation of the loader, in batches of 4."""
    digits = create_dataset("digits", input_img_mode="L", shift=1)
    digits.dataset.targets = digits.dataset.targets[:28]
    dataset = SeededDataset(Counted(digits), seed=1)
    ranks = {"num_replicas": 2, "rank": 1}
    made = {
        "random": lambda data: None,
        "distributed": lambda data: DistributedSampler(data, **ranks),
        "repeated": lambda data: RepeatAugSampler(data, **ranks, selected_round=0),
    }[sampler](dataset)
    settings = {
        "input_size": (1, 16, 16), "batch_size": 4, "is_training": True, "re_prob": 0.5,
        "mean": (0.5,), "std": (0.5,), "num_workers": workers, "device": torch.device("cpu"),
        "use_prefetcher": prefetcher, "persistent_workers": persistent,
        "collate_fn": FastCollateMixup(num_classes=10) if prefetcher else None,
    }  # fmt: skip
    with patch("timm.data.loader.torch.utils.data.distributed.DistributedSampler") as usual:
        usual.return_value = made
        return create_loader(dataset, distributed=made is not None, **settings), dataset.dataset


def batches_from(loader, epoch: int, first: int) -> tuple[int, list[torch.Tensor]]:
    set_loader_epoch(loader, 5, epoch)
    with starting_at(loader, first) as left_out:
        batches = [torch.cat([part.flatten().float() for part in batch]) for batch in loader]
    return left_out, batches


@pytest.mark.parametrize(
    "workers, sampler, prefetcher, persistent",
    [
        (0, "random", True, False),
        (2, "random", True, False),
        (2, "random", True, True),
        (1, "random", False, True),
        (0, "distributed", True, False),
        (0, "repeated", True, False),
    ],
)
def test_a_pass_that_starts_at_a_batch_is_the_rest_of_the_whole_and_reads_no_more(
    workers, sampler, prefetcher, persistent
):
    loader, counted = counted_loader(workers, sampler, prefetcher, persistent)
    _, whole = batches_from(loader, epoch=2, first=0)
    assert len(whole) == len(loader) >= 3
    for first in (1, len(whole) - 1, len(whole)):
        counted.reads.zero_()
        left_out, rest = batches_from(loader, epoch=2, first=first)
        assert left_out == first and counted.reads == 4 * (len(whole) - first)
        assert len(loader) == len(whole)
        for batch, expected in zip(rest, whole[first:], strict=True):
            assert torch.equal(batch, expected)
    _, again = batches_from(loader, epoch=2, first=0)
    assert all(torch.equal(one, other) for one, other in zip(again, whole, strict=True))


def test_what_cannot_start_at_a_batch_is_read_from_the_beginning():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.arange(12))

    class Odd(BatchSampler):
        pass

    odd = DataLoader(Noise(), batch_sampler=Odd(range(12), 4, False))
    for loader in (DataLoader(Stream(), batch_size=4), odd, DataLoader(Noise(), batch_size=None)):
        whole = list(loader)
        with starting_at(loader, 1) as left_out:
            assert left_out == 0 and len(list(loader)) == len(whole)


def test_the_transform_is_the_wrapped_datasets():
    base = create_dataset("digits")
    seeded = SeededDataset(base, 0)
    seeded.transform = np.array
    assert base.transform is seeded.transform is np.array
    assert len(seeded) == 1437 and seeded[0][0].shape == (8, 8, 3)


def test_what_cannot_be_seeded():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(TypeError, match="must be map-style; got Stream"):
        SeededDataset(Stream(), 0)
    with pytest.raises(ValueError, match="seed must be at least 0; got -1"):
        SeededDataset(Noise(), -1)
    with pytest.raises(ValueError, match="epoch must be at least 0; got -2"):
        SeededDataset(Noise(), 0).set_epoch(-2)
