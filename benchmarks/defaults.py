"""Every regularizer's default, checked by training with it; and what CamDrop's blocks give away.

    python -m benchmarks.defaults [--seeds N]

ResNet-8 on scikit-learn's digits at 16 px: six epochs of SGD (0.1, momentum 0.9, weight decay
5e-4, a cosine after one epoch of warm-up), batches of 32, no augmentation. A seed sets the initial
weights and the batches, alike in every row. About a quarter of an hour on one core.

Three accuracies on the 360 held-out digits tell what a network reads from the blocks. One is the
usual one. The others are taken with batch norm in eval mode and only the regularizers in training:
once CamDrop's blocks lie where the true labels say, once where wrong labels say. A network that
reads the label from the blocks is right in the one and wrong in the other.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor, nn

from benchmarks._record import add_output, circumstances, output_stem, write_study
from benchmarks._text import table, versions
from benchmarks.digits_study.protocol import Images, enlarge, to_images
from timm_structdrop.data import DigitsDataset
from timm_structdrop.errors import run_command
from timm_structdrop.layers import DropCluster2d
from timm_structdrop.models.modes import eval_mode
from timm_structdrop.models.placement import paper_schedule, structdrop_layers
from timm_structdrop.training import (
    ClusterRefits,
    DropSchedule,
    Progress,
    RBlockTask,
    StructDropTask,
)
from timm_structdrop.training.rblock import has_fork
from timm_structdrop.training.steps import tell_step

EPOCHS = 6
BATCH = 32
LEARNING_RATE = 0.1
LETTER = {"rank": "valid", "seed_rate": "candidates"}


class Cell(NamedTuple):
    """A row: its words, the model, its keywords, what else it needs."""

    row: str
    model: str = "resnet8"
    settings: dict[str, Any] = {}  # noqa: RUF012  never changed
    random_classes: bool = False
    first_fit: int | None = None


def _camdrop(row: str, gamma: float, random_classes: bool = False, **settings: Any) -> Cell:
    keywords = {"keep_prob": gamma, "block_size": 4, **settings}
    return Cell(row.format(gamma), "resnet8_camdrop", keywords, random_classes)


CELLS = (
    Cell("no regularizer"),
    *(
        Cell(f"{name}, its defaults", f"resnet8_{name}")
        for name in (
            "dropout",
            "spatialdropout",
            "dropblock",
            "rblock",
            "stochasticdepth",
            "dropcluster",
            "camdrop",
        )
    ),
    Cell("dropcluster, clusters found in epochs 3 and 5", "resnet8_dropcluster", first_fit=2),
    *(_camdrop("camdrop, authors' reading, gamma {}", gamma) for gamma in (0.9, 0.7, 0.5)),
    *(_camdrop("camdrop, the letter, gamma {}", gamma, **LETTER) for gamma in (0.9, 0.7, 0.5)),
    *(
        _camdrop("the letter, predicted classes, gamma {}", gamma, guide="predicted", **LETTER)
        for gamma in (0.9, 0.7, 0.5)
    ),
    *(
        _camdrop("the letter, random classes, gamma {}", gamma, True, guide="predicted", **LETTER)
        for gamma in (0.9, 0.7, 0.5)
    ),
    *(
        _camdrop("the letter, averages, gamma {}", gamma, guide="avg", **LETTER)
        for gamma in (0.9, 0.7, 0.5)
    ),
)


class RandomClasses(StructDropTask):
    """Classes drawn at random in place of predicted ones."""

    def guides(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"prediction": torch.randint(10, (len(input),))}


@lru_cache
def digits(train: bool) -> Images:
    data = DigitsDataset(is_train=train, input_img_mode="L")
    return to_images(enlarge(data.images), data.targets)


def train(cell: Cell, seed: int, epochs: int = EPOCHS) -> tuple[nn.Module, float]:
    """A trained model in eval mode, and the mean loss of its last epoch."""
    data = digits(True)
    torch.manual_seed(seed)
    weights = timm.create_model("resnet8", num_classes=10, in_chans=1).state_dict()
    model = timm.create_model(
        cell.model,
        num_classes=10,
        in_chans=1,
        **({} if cell.model == "resnet8" else {"img_size": 16, **cell.settings}),
    )
    model.load_state_dict(weights)
    per_epoch = len(data.images) // BATCH
    total = epochs * per_epoch
    schedule = refits = None
    if list(structdrop_layers(model)):
        schedule = DropSchedule(model, paper_schedule(model), total_updates=total)
    if cell.first_fit is not None:
        refits = ClusterRefits(model, start=cell.first_fit, every=2)
    kind = RBlockTask if has_fork(model) else StructDropTask
    task = (RandomClasses if cell.random_classes else kind)(
        model.train(), schedule=schedule, refits=refits
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=per_epoch)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - per_epoch)
    rates = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [per_epoch])
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    losses = []
    for epoch in range(epochs):
        task.begin_epoch(epoch)
        for index in torch.randperm(len(data.images), generator=order).split(BATCH)[:per_epoch]:
            task.begin_update(len(losses))
            loss = task(data.images[index], data.classes[index])["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            losses.append(loss.item())
    return model.eval(), statistics.fmean(losses[-per_epoch:])


@torch.no_grad()
def accuracy(model: nn.Module, guided_by: Tensor | None = None) -> float:
    """Percent of the held-out digits; with the regularizers in training if classes guide them."""
    data = digits(False)
    active = [] if guided_by is None else list(structdrop_layers(model))
    with eval_mode(model, active), tell_step(model, guided_by, guided_by, len(data.images)):
        right = model(data.images).argmax(1) == data.classes
    return 100.0 * float(right.double().mean())


def measured(cell: Cell, seed: int) -> dict[str, Any]:
    """One training and its figures."""
    start = time.perf_counter()
    model, loss = train(cell, seed)
    classes = digits(False).classes
    wrong = (classes + torch.randint(1, 10, classes.shape)) % 10
    found: dict[str, Any] = {"train_loss": loss, "top1": accuracy(model)}
    if any(layer.needs_classes for layer in structdrop_layers(model)):
        found["true_label"] = accuracy(model, classes)
        found["wrong_label"] = accuracy(model, wrong)
    masks = [~layer.structured for layer in model.modules() if isinstance(layer, DropCluster2d)]
    if masks:
        found["masked_channels"] = int(torch.cat(masks).sum())
    return {"row": cell.row, "seed": seed, **found, "seconds": time.perf_counter() - start}


def runs(cells: Sequence[Cell], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    progress = Progress("Trainings", len(cells) * len(seeds), log_interval=1)
    for cell in cells:
        for seed in seeds:
            found = measured(cell, seed)
            progress.update(len(digits(True).images) * EPOCHS, {"top1": found["top1"]})
            yield found
    progress.close()


def spread(values: Sequence[float], places: int = 1) -> str:
    """``96.9 (94.4 to 97.8)``: mean, smallest and largest."""
    mean, low, high = (f"{x:.{places}f}" for x in (np.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def report(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    found = results["runs"]
    rows = []
    for name in dict.fromkeys(run["row"] for run in found):
        of_row = [run for run in found if run["row"] == name]
        guided = [
            spread([run[key] for run in of_row]) if key in of_row[0] else ""
            for key in ("true_label", "wrong_label")
        ]
        loss = spread([run["train_loss"] for run in of_row], 3)
        rows.append([name, spread([run["top1"] for run in of_row]), loss, *guided])
    n_seeds = len({run["seed"] for run in found})
    header = ["regularizer", "top-1", "training loss", "blocks of the label", "of a wrong label"]
    lines = [
        "# Every default, checked by training with it",
        "",
        f"`{results['command']}`: ResNet-8 on scikit-learn's digits at 16 px, {EPOCHS} epochs, "
        f"{n_seeds} seeds; mean, smallest and largest, in percent of 360 held-out digits. CamDrop "
        "has blocks of 4 but in the row of its defaults (8, clamped to the last group's map of 4). "
        "The last two columns: accuracy with CamDrop's blocks on, laid where the true or a wrong "
        f"label says. {results['hardware']}; {versions(results)}.",
        "",
        *table(header, rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="trainings a row (5)")
    add_output(parser, "defaults")
    args = parser.parse_args()
    output = output_stem(args.output)
    torch.set_num_threads(1)
    results = {
        **circumstances("benchmarks.defaults"),
        "runs": list(runs(CELLS, range(args.seeds))),
    }
    write_study(results, report(results), output)


if __name__ == "__main__":
    run_command(main)
