"""A training step of CamDrop against a plain one, and where its time goes.

    python -m benchmarks.camdrop [--repeats N] [--batch-size N] [--img-size N]

ResNet-50, CamDrop in groups 3 and 4 with its defaults, one thread, one process. A step is the
forward, the loss, the backward and an SGD update. The two kinds of steps take turns, and ratios are
taken within a turn, so that what else the machine does meets both. The parts are timed inside of
the CamDrop step: a share of the processor time of the same step, which other processes disturb much
less than a difference of two steps. What the layers cost outside of themselves (memory, caches) is
in the ratio only.
"""

import argparse
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import timm
import torch

import timm_structdrop  # noqa: F401  registers the models
from benchmarks._timing import one_thread, paired_times, spread
from timm_structdrop.layers import _few_maps, camdrop
from timm_structdrop.models.placement import structdrop_layers
from timm_structdrop.training import StructDropTask

CLASSES = 1000
STEPS = ("plain", "camdrop")
MAPS, SEEDS, DROPPING = "class activation maps", "ranking, seeds and blocks", "dropping"


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
        task(images, target)["loss"].backward()
        optimizer.step()

    return step


@contextmanager
def timed_parts() -> Iterator[Counter[str]]:
    """Processor seconds spent in CamDrop's functions, by name."""
    seconds: Counter[str] = Counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **settings: Any) -> Any:
            start = time.process_time()
            result = function(*args, **settings)
            seconds[name] += time.process_time() - start
            return result

        return run

    backward = staticmethod(timed("backward", _few_maps._ScaleAndDrop.backward))
    with ExitStack() as stack:
        for name in ("cam_drop_2d", "guidance", "drop_in_maps"):
            function = timed(name, getattr(camdrop, name))
            stack.enter_context(patch.object(camdrop, name, function))
        stack.enter_context(patch.object(_few_maps._ScaleAndDrop, "backward", backward))
        yield seconds


def shares(step: Callable[[], None], repeats: int) -> dict[str, float]:
    """The parts of CamDrop in its own step, medians of their shares of its processor time."""
    found: dict[str, list[float]] = {MAPS: [], SEEDS: [], DROPPING: []}
    for _ in range(repeats):
        with timed_parts() as seconds:
            start = time.process_time()
            step()
            whole = time.process_time() - start
        inside = seconds["guidance"] + seconds["drop_in_maps"]
        found[MAPS].append(seconds["guidance"] / whole)
        found[SEEDS].append((seconds["cam_drop_2d"] - inside) / whole)
        found[DROPPING].append((seconds["drop_in_maps"] + seconds["backward"]) / whole)
    return {name: statistics.median(values) for name, values in found.items()}


def run(repeats: int = 7, batch: int = 16, size: int = 128) -> dict[str, Any]:
    """Measure the steps.

    Args:
        repeats: rounds in which the steps take turns, and steps whose parts are timed.
        batch: images of a step.
        size: of the images, in pixels.

    Returns:
        ``step_ms``, the medians; ``ratio`` and ``processor_ratio`` of the CamDrop step to the plain
        one, median and quartiles; and ``shares``, see :func:`shares`.
    """
    steps = {kind: make_step(kind, batch, size) for kind in STEPS}
    with one_thread():
        times = paired_times(steps, repeats)
        parts = shares(steps["camdrop"], repeats)
    return {
        "benchmark": "camdrop",
        "batch": batch,
        "size": size,
        "layers": len(list(structdrop_layers(timm.create_model("resnet50_camdrop")))),
        "step_ms": {kind: statistics.median(times[kind].elapsed) for kind in STEPS},
        "ratio": spread(times["camdrop"].elapsed, times["plain"].elapsed),
        "processor_ratio": spread(times["camdrop"].processor, times["plain"].processor),
        "shares": parts,
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
    print(f"plain step {found['step_ms']['plain']:.0f} ms; shares of the CamDrop step")
    for name, share in found["shares"].items():
        print(f"  {name:26s} {100 * share:5.2f} %")
    print(f"  {'together':26s} {100 * sum(found['shares'].values()):5.2f} %")


if __name__ == "__main__":
    main()
