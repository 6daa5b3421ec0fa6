"""A training step of CamDrop against a plain one, and where its time goes.

    python -m benchmarks.camdrop [--repeats N] [--batch-size N] [--img-size N]

ResNet-50, CamDrop in groups 3 and 4 with its defaults, one thread, one process. A step
is the forward, the loss, the backward and an SGD update. Between the plain and the full step stand
two that stop CamDrop half-way: ``cams`` computes the maps J and leaves the activations alone;
``candidates`` also ranks pixels and channels, draws the seeds and grows the blocks, and drops
nothing. All take turns, and ratios are taken within a turn. Processor time does not count waiting
for one's turn on a busy machine; what the machine's other processes do to the caches it does.
"""

import argparse
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor

import timm_structdrop  # noqa: F401  registers the models
from benchmarks._timing import one_thread, paired_times, spread
from timm_structdrop.layers import camdrop
from timm_structdrop.models.placement import structdrop_layers
from timm_structdrop.training import StructDropTask

CLASSES = 1000
STEPS = ("plain", "cams", "candidates", "camdrop")
PARTS = {"cams": "class activation maps", "candidates": "seeds and blocks", "camdrop": "dropping"}


def cams_only(x: Tensor, alpha: Tensor, *settings: Any) -> Tensor:
    with torch.no_grad():
        camdrop.guidance(x, alpha, "cam")
    return x


@contextmanager
def stopped_at(kind: str) -> Iterator[None]:
    """CamDrop's functions replaced by ones that do less."""
    less = {
        "cams": ("cam_drop_2d", cams_only),
        "candidates": ("drop_in_maps", lambda x, *maps: x),
    }
    if kind not in less:
        yield
        return
    with patch.object(camdrop, *less[kind]):
        yield


def make_step(kind: str, batch: int, size: int) -> Callable[[], None]:
    """One training step of the kind, always on the same batch."""
    torch.manual_seed(0)
    task = StructDropTask(
        timm.create_model("resnet50" if kind == "plain" else "resnet50_camdrop"), verbose=False
    )
    task.train()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.01, momentum=0.9)
    images, target = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        with stopped_at(kind):
            task(images, target)["loss"].backward()
        optimizer.step()

    return step


def run(repeats: int = 7, batch: int = 16, size: int = 128) -> dict[str, Any]:
    """Measure the steps.

    Args:
        repeats: rounds in which they take turns.
        batch: images of a step.
        size: of the images, in pixels.

    Returns:
        ``step_ms``, the medians; ``ratio`` and ``processor_ratio`` of the full to the plain step,
        median and quartiles; and ``share``, what each part adds, in plain steps of processor time
        (medians).
    """
    with one_thread():
        times = paired_times({kind: make_step(kind, batch, size) for kind in STEPS}, repeats)
    share = {}
    for before, kind in pairwise(STEPS):
        added = zip(
            times[kind].processor, times[before].processor, times["plain"].processor, strict=True
        )
        share[kind] = statistics.median((b - a) / plain for b, a, plain in added)
    return {
        "benchmark": "camdrop",
        "batch": batch,
        "size": size,
        "layers": len(list(structdrop_layers(timm.create_model("resnet50_camdrop")))),
        "step_ms": {kind: statistics.median(times[kind].elapsed) for kind in STEPS},
        "ratio": spread(times["camdrop"].elapsed, times["plain"].elapsed),
        "processor_ratio": spread(times["camdrop"].processor, times["plain"].processor),
        "share": share,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="rounds (7)")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step (16)")
    parser.add_argument("--img-size", type=int, default=128, help="image size (128)")
    arguments = parser.parse_args()
    found = run(arguments.repeats, arguments.batch_size, arguments.img_size)
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"timm {timm.__version__}; ResNet-50 with {found['layers']} layers of CamDrop, batch "
        f"{found['batch']} at {found['size']} px, one thread; {found['repeats']} rounds, "
        f"load {load}"
    )
    for name in ("ratio", "processor_ratio"):
        ratio = found[name]
        print(
            f"{'elapsed' if name == 'ratio' else 'processor'} time, CamDrop / plain: "
            f"{ratio['median']:.3f} (quartiles {ratio['low']:.3f} to {ratio['high']:.3f})"
        )
    print(f"plain step {found['step_ms']['plain']:.0f} ms; of it CamDrop adds")
    for kind, share in found["share"].items():
        print(f"  {PARTS[kind]:24s} {100 * share:5.1f} %")


if __name__ == "__main__":
    main()
