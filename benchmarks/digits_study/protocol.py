"""One run of the study: 600 steps of LeNet-5 on a few real digits, and what it can do afterwards.

LeNet-5 at 16 px, AdamW at 3e-3 with one cycle, batches of 50, no augmentation. A seed sets which
1000 of the 1437 training digits may be trained on (the others are for validation), which share of
them is, the initial weights and the batches; the regularizers are compared at equal seeds. The 360
held-out digits are the test images of every run.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from timm.loss import LabelSmoothingCrossEntropy
from torch import Tensor, nn

from benchmarks.digits_study.cells import FITS, Cell
from timm_structdrop.cluster import ReNAResult
from timm_structdrop.data import DigitsDataset, balanced_indices
from timm_structdrop.evaluation import (
    PAPER_CORRUPTIONS,
    SEVERITIES,
    Attack,
    corrupt,
    evaluate_attack,
)
from timm_structdrop.layers import DropCluster2d
from timm_structdrop.models.placement import paper_schedule
from timm_structdrop.training import DropSchedule, make_task

SIZE = 16
STEPS = 600
BATCH = 50
LEARNING_RATE = 3e-3
POOL = 1000
NOISE = 0.4
MEAN, STD = 0.1307, 0.3081
# the columns of a row, in percent but for the loss and the seconds
FIGURES = (
    "val_top1",
    "test_top1",
    "noisy_top1",
    *(f"{name}_top1" for name in PAPER_CORRUPTIONS),
    "pgd_error",
    "pgd_success",
    "train_loss",
    "unstructured",
    "seconds",
)


class Images(NamedTuple):
    """Pixels (N, 1, 16, 16) in [0, 1], normalised, and their classes (N,)."""

    images: Tensor
    classes: Tensor


class Test(NamedTuple):
    """The held-out digits: clean, under noise of standard deviation 0.4, and corrupted."""

    clean: Images
    noisy: Images
    corrupted: dict[str, Images]


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - MEAN) / STD


def enlarge(images: np.ndarray) -> np.ndarray:
    """uint8 digits (N, 8, 8) to (N, 16, 16)."""
    return np.stack(
        [
            np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            for image in images
        ]
    )


def to_images(pixels: np.ndarray, classes: Any) -> Images:
    values = torch.from_numpy(pixels).float().unsqueeze(1) / 255
    return Images(normalised(values), torch.as_tensor(classes))


@lru_cache
def training_digits() -> Images:
    digits = DigitsDataset(is_train=True, input_img_mode="L")
    return to_images(enlarge(digits.images), digits.targets)


@lru_cache
def test_digits() -> Test:
    """The test images in every form; takes half a minute."""
    digits = DigitsDataset(is_train=False, input_img_mode="L")
    pixels = enlarge(digits.images)
    clean = to_images(pixels, digits.targets)
    noise = torch.randn(clean.images.shape, generator=torch.Generator().manual_seed(0))
    noisy = Images(clean.images + NOISE / STD * noise, clean.classes)
    corrupted = {}
    for number, name in enumerate(PAPER_CORRUPTIONS):
        every = [
            corrupt(image, name, severity, seed=(0, index, number, severity))
            for severity in SEVERITIES
            for index, image in enumerate(pixels)
        ]
        corrupted[name] = to_images(np.stack(every), digits.targets * len(SEVERITIES))
    return Test(clean, noisy, corrupted)


def split(fraction: float, seed: int) -> tuple[Images, Images]:
    """The images of a run to train on, a class-balanced share of 1000, and those to validate on."""
    everything = training_digits()
    classes = everything.classes.numpy()
    pool = balanced_indices(classes, POOL / len(classes), seed)
    chosen = pool[balanced_indices(classes[pool], fraction, seed)]
    rest = np.setdiff1d(np.arange(len(classes)), pool)
    train, validation = (
        Images(everything.images[index], everything.classes[index]) for index in (chosen, rest)
    )
    return train, validation


def build(cell: Cell, rate: float, seed: int) -> nn.Module:
    """The model of a cell, with the initial weights that every cell of a seed has."""
    torch.manual_seed(seed)
    weights = timm.create_model("lenet5", num_classes=10).state_dict()
    if cell.variant is None:
        model = timm.create_model("lenet5", num_classes=10)
    else:
        model = timm.create_model(
            cell.variant, num_classes=10, img_size=SIZE, drop_block_rate=rate, **cell.settings
        )
    model.load_state_dict(weights)
    return model


def voronoi(layer: DropCluster2d, generator: torch.Generator) -> ReNAResult:
    """Random cells in place of clusters: for each channel, the pixels nearest to random centres."""
    channels, height, width = layer.labels.shape
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack((rows.flatten(), cols.flatten()), 1).float()
    order = torch.rand(channels, height * width, generator=generator).argsort(1)
    centres = places[order[:, : layer.n_clusters]]
    labels = torch.cdist(places.expand(channels, -1, -1), centres).argmin(2)
    found = torch.full((channels,), layer.n_clusters)
    return ReNAResult(labels.view(channels, height, width), found, found > 0)


def set_voronoi_cells(model: nn.Module, seed: int) -> None:
    """Give every DropCluster layer random cells as if they had been fitted."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, DropCluster2d):
            result = voronoi(layer, generator)
            layer.labels.copy_(result.labels)
            layer.structured.fill_(True)
            layer.fitted_at.fill_(0)
            layer.fitted_size.copy_(torch.tensor(result.labels.shape[1:]))


def train(cell: Cell, rate: float, seed: int, data: Images) -> tuple[nn.Module, float]:
    """A trained model and the mean loss of its last 50 steps."""
    model = build(cell, rate, seed).train()
    smoothing = rate if cell.name == "label smoothing" else 0.0
    criterion = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
    schedule = None
    if cell.variant is not None:
        shape = cell.schedule or paper_schedule(model)
        schedule = DropSchedule(model, shape, total_updates=STEPS, start_update=cell.start)
    task = make_task(model, criterion, schedule=schedule)
    clusters = [layer for layer in model.modules() if isinstance(layer, DropCluster2d)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    order = torch.Generator().manual_seed(1000 * cell.order + seed)
    torch.manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    losses = []
    for step in range(STEPS):
        if len(waiting) < BATCH:
            waiting = torch.randperm(len(data.images), generator=order)
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        if step in FITS and cell.voronoi:
            set_voronoi_cells(model, 100 * seed + step)
        elif step in FITS:
            for layer in clusters:
                layer.request_fit(at=step)
        task.begin_update(step)
        loss = task(data.images[batch], data.classes[batch])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        losses.append(loss.item())
    return model.eval(), sum(losses[-50:]) / 50


@torch.no_grad()
def top1(model: nn.Module, data: Images) -> float:
    """Percent."""
    return 100.0 * float((model(data.images).argmax(1) == data.classes).float().mean())


def run(cell: Cell, rate: float, fraction: float, seed: int, test: bool = True) -> dict[str, Any]:
    """Train and measure: a row. Without ``test``, on the validation images only."""
    start = time.perf_counter()
    data, validation = split(fraction, seed)
    model, loss = train(cell, rate, seed, data)
    row: dict[str, Any] = {"train_loss": loss, "val_top1": top1(model, validation)}
    masks = [~layer.structured for layer in model.modules() if isinstance(layer, DropCluster2d)]
    row["unstructured"] = int(torch.cat(masks).sum()) if masks else ""
    if test:
        images = test_digits()
        row["test_top1"] = top1(model, images.clean)
        row["noisy_top1"] = top1(model, images.noisy)
        for name, corrupted in images.corrupted.items():
            row[f"{name}_top1"] = top1(model, corrupted)
        attacked = evaluate_attack(
            model, [tuple(images.clean)], Attack(targeted=True), mean=[MEAN], std=[STD]
        )
        row["pgd_error"] = attacked["error_rate"]
        row["pgd_success"] = attacked["success_rate"]
    row["seconds"] = time.perf_counter() - start
    return row
