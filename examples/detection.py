"""DropBlock in a detector: torchvision's RetinaNet with FPN on a timm_structdrop backbone.

    python -m examples.detection --output detection

trains on boxes that are generated while it runs: textured discs, squares and triangles pasted into
the two photographs that come with scikit-learn. A few minutes on two CPU cores. It prints what
DropBlock dropped, and writes the figures and a picture of what was found.

COCO (2017: train2017/, val2017/, annotations/), on a GPU. DropBlock's paper reports that DropBlock
raises the AP of RetinaNet from 36.8 to 38.4; the text at hand ends before the section on it.
Below, keep_prob 0.9, block 7, groups 3 and 4 and the linear schedule are those of its ImageNet
experiments; the rest is usual for RetinaNet with a ResNet-50 FPN from pretrained weights. It was
not run to the end, and may not reach those figures.

    python -m examples.detection --coco DIR --model resnet50_dropblock.a1_in1k --pretrained \\
        --keep-prob 0.9 --block-size 7 --img-size 800 1333 --channels 256 --coarse \\
        --steps 90000 --batch-size 16 --opt sgd --lr 0.01 --weight-decay 1e-4 --workers 8
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.models.detection import RetinaNet

import timm_structdrop  # noqa: F401  registers the models
from examples._boxes import CocoBoxes, PastedObjects
from examples._detector import measured_drops, retinanet
from examples._scores import Boxes, average_precision
from timm_structdrop.analysis.figure import new_figure
from timm_structdrop.errors import UserError, run_command
from timm_structdrop.files import output_folder, save_json, save_png
from timm_structdrop.models.placement import structdrop_layers
from timm_structdrop.recipes import FlagParser
from timm_structdrop.recipes.parser import at_least
from timm_structdrop.training import DropSchedule, Progress

VALIDATION_IMAGES = 100
DRAWN = 0.3  # least score of the boxes in the picture
COCO_IOUS = [0.5 + 0.05 * i for i in range(10)]


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse_flags(argv)
    torch.manual_seed(flags.seed)
    folder = output_folder(flags.output)
    device = torch.device(flags.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    train_data, validation_data = data_sets(flags)
    model = build(flags, len(train_data.classes)).to(device)
    losses, dropped = train(model, train_data, flags, device)
    found, truth = detect(model, validation_data, flags, device)
    scores = score(found, truth, len(train_data.classes), bool(flags.coco))
    figures = {**scores, "dropped": dropped, "loss": losses, "flags": vars(flags)}
    save_json(figures, folder / "detection.json")
    save_png(draw(validation_data, found), folder / "detection.png")
    report(scores, losses, dropped)
    print(f"Figures and a picture are in {folder}")


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = FlagParser(
        prog="python -m examples.detection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", default="detection", metavar="DIR", help="folder of the results")
    add("--coco", metavar="DIR", help="folder of COCO 2017; generated boxes if not given")
    add("--model", default="resnet18_dropblock", metavar="NAME", help="backbone")
    add("--pretrained", action="store_true", help="the backbone's pretrained weights")
    add("--keep-prob", type=float, default=0.9, metavar="P", help="of DropBlock, at the end (0.9)")
    add("--block-size", type=at_least(1), default=3, metavar="N", help="side of the blocks (3)")
    add("--img-size", type=at_least(48), nargs="+", default=[64], metavar="N", help="(64)")
    add("--channels", type=at_least(1), default=64, metavar="N", help="of the pyramid (64)")
    add("--coarse", action="store_true", help="pyramid levels at 1/64 and 1/128 too")
    add("--steps", type=at_least(1), default=400, metavar="N", help="optimizer updates (400)")
    add("--batch-size", type=at_least(1), default=8, metavar="N", help="images per update (8)")
    add("--opt", choices=("adamw", "sgd"), default="adamw", help="optimizer (adamw)")
    add(
        "--lr", type=float, default=1.5e-3, metavar="LR", help="peak of the one-cycle rate (1.5e-3)"
    )
    add("--weight-decay", type=float, default=1e-4, metavar="WD", help="(1e-4)")
    add("--workers", type=at_least(0), default=1, metavar="N", help="of the loader (1)")
    add("--device", metavar="NAME", help="cpu, cuda, ...; cuda where there is one, else cpu")
    add("--seed", type=at_least(0), default=0, metavar="S", help="of everything random (0)")
    flags = parser.parse_flags(argv)
    if len(flags.img_size) > 2:
        raise UserError(f"--img-size must be one number or two; got {len(flags.img_size)}")
    if not 0 < flags.keep_prob <= 1:
        raise UserError(f"--keep-prob must be in (0, 1]; got {flags.keep_prob}")
    return flags


def data_sets(flags: argparse.Namespace) -> tuple[Any, Any]:
    if flags.coco:
        return CocoBoxes(flags.coco, True), CocoBoxes(flags.coco, False)
    size, length = flags.img_size[0], flags.steps * flags.batch_size
    return (
        PastedObjects(size, length, True, flags.seed),
        PastedObjects(size, VALIDATION_IMAGES, False, flags.seed),
    )


def build(flags: argparse.Namespace, n_classes: int) -> RetinaNet:
    settings: dict[str, Any] = {}
    if flags.model.split(".")[0].endswith("_dropblock"):
        settings = {"keep_prob": flags.keep_prob, "block_size": flags.block_size}
    return retinanet(
        flags.model,
        n_classes,
        img_size=(flags.img_size[0], flags.img_size[-1]),
        channels=flags.channels,
        coarse=flags.coarse,
        anchor_scale=4 if flags.coarse else 2,
        pretrained=flags.pretrained,
        **settings,
    )


def train(
    model: RetinaNet, data: Any, flags: argparse.Namespace, device: torch.device
) -> tuple[list[float], dict[str, float]]:
    """Losses by update, and the fractions that DropBlock dropped in the last tenth of them."""
    make = torch.optim.AdamW if flags.opt == "adamw" else torch.optim.SGD
    momentum = {} if flags.opt == "adamw" else {"momentum": 0.9}
    optimizer = make(model.parameters(), lr=flags.lr, weight_decay=flags.weight_decay, **momentum)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, flags.lr, total_steps=flags.steps, pct_start=0.15
    )
    schedule = None
    if list(structdrop_layers(model)):
        schedule = DropSchedule(model, "linear", total_updates=flags.steps)
    progress = Progress("Train", flags.steps, log_interval=max(1, flags.steps // 20))
    losses: list[float] = []

    def update(images: Sequence[Tensor], targets: Sequence[Boxes]) -> None:
        if schedule is not None:
            schedule.step(len(losses))
        loss = sum(model(list(images), list(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        losses.append(loss.item())
        progress.update(len(images), {"loss": sum(losses[-20:]) / len(losses[-20:])})

    model.train()
    batches = training_batches(data, flags, device)
    measured = max(1, flags.steps // 10)
    for _ in range(flags.steps - measured):
        update(*next(batches))
    with measured_drops(model) as dropped:
        for _ in range(measured):
            update(*next(batches))
    progress.close()
    return losses, dropped


def training_batches(
    data: Dataset, flags: argparse.Namespace, device: torch.device
) -> Iterator[tuple[list[Tensor], list[Boxes]]]:
    generator = torch.Generator().manual_seed(flags.seed)
    count = flags.steps * flags.batch_size
    sampler = RandomSampler(data, num_samples=count, generator=generator)
    yield from loaded(data, flags, device, sampler)


def loaded(
    data: Dataset, flags: argparse.Namespace, device: torch.device, sampler: Any = None
) -> Iterator[tuple[list[Tensor], list[Boxes]]]:
    loader = DataLoader(
        data,
        flags.batch_size,
        sampler=sampler,
        num_workers=flags.workers,
        collate_fn=lists,
    )
    for images, targets in loader:
        on_device = [{k: v.to(device) for k, v in target.items()} for target in targets]
        yield [image.to(device) for image in images], on_device


def lists(samples: Sequence[tuple[Tensor, Boxes]]) -> tuple[list[Tensor], list[Boxes]]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


@torch.no_grad()
def detect(
    model: RetinaNet, data: Any, flags: argparse.Namespace, device: torch.device
) -> tuple[list[Boxes], list[Boxes]]:
    """Boxes found in the validation images, where nothing is dropped, and the true ones."""
    model.eval()
    found: list[Boxes] = []
    truth: list[Boxes] = []
    for images, targets in loaded(data, flags, device):
        found += [{k: v.cpu() for k, v in boxes.items()} for boxes in model(images)]
        truth += [{k: v.cpu() for k, v in boxes.items()} for boxes in targets]
    return found, truth


def score(
    found: Sequence[Boxes], truth: Sequence[Boxes], n_classes: int, coco: bool
) -> dict[str, float]:
    """In percent, at IoU 0.5: AP, and the objects found by boxes with a score that is drawn. For
    COCO also the mean AP over IoU 0.5 to 0.95.

    COCO's own figure treats crowds apart and interpolates at 101 recalls: near, not the same.
    """
    sure = [{k: v[boxes["scores"] >= DRAWN] for k, v in boxes.items()} for boxes in found]
    half = average_precision(found, truth, n_classes, 0.5)
    recall = average_precision(sure, truth, n_classes, 0.5)["recall"]
    scores = {"ap50": half["ap"], "recall50": recall, "objects": half["objects"]}
    if coco:
        areas = [average_precision(found, truth, n_classes, iou)["ap"] for iou in COCO_IOUS]
        scores["ap"] = sum(areas) / len(areas)
    return {name: round(value, 2) for name, value in scores.items()}


def draw(data: Any, found: Sequence[Boxes]) -> Any:
    """Six images: the true boxes dashed, those found with their class and score."""
    colours = ("#d55e00", "#0072b2", "#009e73")
    figure = new_figure(10.2, 7.2)
    for index, axis in enumerate(figure.subplots(2, 3).flatten()):
        axis.set_axis_off()
        if index >= len(found):
            continue
        image, target = data[index]
        axis.imshow(image.permute(1, 2, 0).numpy())
        for x1, y1, x2, y2 in target["boxes"].tolist():
            axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], "--", color="white", lw=1.4)
        three = (found[index][name].tolist() for name in ("boxes", "labels", "scores"))
        for box, label, value in zip(*three, strict=True):
            if value < DRAWN:
                continue
            (x1, y1, x2, y2), colour = box, colours[label % len(colours)]
            axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=colour, lw=2)
            name = {"color": "white", "fontsize": 8, "va": "bottom"}
            text = f"{data.classes[label]} {value:.2f}"
            axis.text(x1, y1, text, bbox={"facecolor": colour, "lw": 0, "pad": 1.5}, **name)
    figure.suptitle(f"Objects (dashed) and boxes found with a score of {DRAWN:g} or more")
    figure.tight_layout()
    return figure


def report(scores: dict[str, float], losses: list[float], dropped: dict[str, float]) -> None:
    few = max(1, len(losses) // 20)
    print(f"Loss {sum(losses[:few]) / few:.3f} -> {sum(losses[-few:]) / few:.3f}")
    for name, fraction in dropped.items():
        if name != "all":
            print(f"Dropped {100 * fraction:5.2f} %  {name.removeprefix('backbone.features.')}")
    print(f"Dropped {100 * dropped['all']:.2f} % of the active units, over all layers")
    print(json.dumps(scores))


if __name__ == "__main__":
    started = time.perf_counter()
    run_command(main)
    print(f"{time.perf_counter() - started:.0f} s")
