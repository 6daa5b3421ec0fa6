"""The same (seed, epoch, rank, index) is the same sample, whoever loads it and however."""

import random
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from timm.data import AugMixDataset, FastCollateMixup, create_loader
from torch.utils.data import DataLoader, Dataset, IterableDataset

from timm_structdrop.data import SeededDataset, create_dataset


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
