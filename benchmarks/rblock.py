"""A training step of R-Block: against the step over the concatenated batch, and a plain step.

    python -m benchmarks.rblock [--repeats N] [--sub-models sdropdml bdropdml ...]

ResNet-50, R-Block in groups 3 and 4, batch 16 at 128 px, one thread. A step is the forward, the
loss, the backward and an SGD update. The concatenated step sends (x, x) through the whole network
with the same R-Block layers and the same loss; the plain step has neither. All take turns, and the
ratios are taken within a turn: what else the machine does then meets all of them. Several sub
models are also compared with the first of them. Ratios of processor time stand beside those of
elapsed time, because on a busy machine the process also waits for its turn.
"""

import argparse
import os
import platform
import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

import timm_structdrop  # noqa: F401  registers the models
from benchmarks._timing import Times, one_thread, paired_times, spread
from timm_structdrop.layers import SUB_MODELS, Fork
from timm_structdrop.training import RBlockTask, StructDropTask

BATCH, SIZE, CLASSES = 16, 128, 1000


class Concatenated(nn.Module):
    """A model with R-Block, forked at the image instead of at its first regularized group."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.fork = Fork()
        self.model = model
        for module in model.modules():
            if isinstance(module, Fork):
                module.forward = lambda x: x  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(self.fork(x))
        return out


def make_step(kind: str, sub_models: str) -> Callable[[], None]:
    """One training step of the kind, always on the same batch."""
    torch.manual_seed(0)
    if kind == "plain":
        task = StructDropTask(timm.create_model("resnet50"), verbose=False)
    else:
        model = timm.create_model("resnet50_rblock", sub_models=sub_models)
        task = RBlockTask(Concatenated(model) if kind == "concatenated" else model, verbose=False)
    task.train()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.01, momentum=0.9)
    images, target = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(CLASSES, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        task(images, target)["loss"].backward()
        optimizer.step()

    return step


def run(repeats: int = 7, sub_models: tuple[str, ...] = ("sdropdml",)) -> list[dict[str, Any]]:
    """Measure the constructions of the sub models.

    Args:
        repeats: rounds in which all steps take turns.
        sub_models: keywords of R-Block.

    Returns:
        Rows of ``case``, the median seconds of a step, median and quartiles of the ratio of
        elapsed times, and the median ratio of processor times: each construction against its
        concatenated step, the plain step, and the first construction.
    """
    first = sub_models[0]
    steps = {"plain": make_step("plain", first)}
    for name in sub_models:
        steps[name] = make_step("forked", name)
        steps[f"concatenated {name}"] = make_step("concatenated", name)
    with one_thread():
        times = paired_times(steps, repeats, warm_up=1)
    rows = []
    for name in sub_models:
        others = [f"concatenated {name}", "plain", *([first] if name != first else [])]
        rows += [compared(f"{name} / {other}", times[name], times[other]) for other in others]
    return rows


def compared(case: str, ours: Times, other: Times) -> dict[str, Any]:
    """A row from paired times."""
    return {
        "benchmark": "rblock",
        "case": case,
        "seconds": statistics.median(ours.elapsed) / 1000,
        "other_seconds": statistics.median(other.elapsed) / 1000,
        "ratio": spread(ours.elapsed, other.elapsed),
        "processor_ratio": spread(ours.processor, other.processor)["median"],
        "repeats": len(ours.elapsed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="paired measurements of each")
    parser.add_argument("--sub-models", nargs="+", default=["sdropdml"], choices=SUB_MODELS)
    arguments = parser.parse_args()
    rows = run(arguments.repeats, tuple(arguments.sub_models))
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"timm {timm.__version__}; ResNet-50, batch {BATCH} at {SIZE} px, one thread; "
        f"{arguments.repeats} rounds, load {load}; median (quartiles)"
    )
    for row in rows:
        ratio = row["ratio"]
        print(
            f"{row['case']:34s} {row['seconds']:6.2f} s / {row['other_seconds']:6.2f} s: "
            f"{ratio['median']:5.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}), "
            f"processor time {row['processor_ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
