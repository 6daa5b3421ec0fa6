"""A training step of R-Block: against the step over the concatenated batch, and a plain step.

    python -m benchmarks.rblock [--repeats N] [--sub-models sdropdml bdropdml ...]

ResNet-50, R-Block in groups 3 and 4, batch 16 at 128 px, one thread. A step is the forward, the
loss, the backward and an SGD update. The concatenated step sends (x, x) through the whole network
with the same R-Block layers and the same loss; the plain step has neither. Each repeat times the
three one after the other, in turning order, and takes the ratios: what else the machine does then
meets all three. Ratios of processor time are given beside those of elapsed time, because on a busy
machine the process also waits for its turn.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

import timm_structdrop  # noqa: F401  registers the models
from timm_structdrop.layers import SUB_MODELS, Fork
from timm_structdrop.training import RBlockTask, StructDropTask

BATCH, SIZE, CLASSES = 16, 128, 1000
STEPS = ("forked", "concatenated", "plain")


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


def timed(function: Callable[[], None]) -> tuple[float, float]:
    """Elapsed seconds and processor seconds of one call."""
    elapsed, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - elapsed, time.process_time() - processor


def run(repeats: int = 7, sub_models: tuple[str, ...] = ("sdropdml",)) -> list[dict[str, Any]]:
    """Measure each construction of the sub models.

    Args:
        repeats: paired measurements of each.
        sub_models: keywords of R-Block.

    Returns:
        Two rows each, against the concatenated and against the plain step: the median seconds of
        both, the median, smallest and largest ratio, and the median ratio of processor times.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for name in sub_models for row in measure(name, repeats)]
    finally:
        torch.set_num_threads(threads)


def measure(sub_models: str, repeats: int) -> list[dict[str, Any]]:
    steps = {kind: make_step(kind, sub_models) for kind in STEPS}
    for step in steps.values():
        step()
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in STEPS}
    for repeat in range(repeats):
        turn = repeat % len(STEPS)
        for kind in STEPS[turn:] + STEPS[:turn]:
            times[kind].append(timed(steps[kind]))
    return [compared(sub_models, times["forked"], times[kind], kind) for kind in STEPS[1:]]


def compared(
    sub_models: str, ours: list[tuple[float, float]], other: list[tuple[float, float]], name: str
) -> dict[str, Any]:
    """A row from paired (elapsed, processor) seconds."""
    ratios = [a[0] / b[0] for a, b in zip(ours, other, strict=True)]
    return {
        "benchmark": "rblock",
        "case": f"{sub_models} against the {name} step",
        "seconds": statistics.median(elapsed for elapsed, _ in ours),
        "other_seconds": statistics.median(elapsed for elapsed, _ in other),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "processor_ratio": statistics.median(a[1] / b[1] for a, b in zip(ours, other, strict=True)),
        "repeats": len(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="paired measurements of each")
    parser.add_argument("--sub-models", nargs="+", default=["sdropdml"], choices=SUB_MODELS)
    arguments = parser.parse_args()
    rows = run(arguments.repeats, tuple(arguments.sub_models))
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"timm {timm.__version__}; ResNet-50, batch {BATCH} at {SIZE} px, one thread"
    )
    for row in rows:
        print(
            f"{row['case']:40s} {row['seconds']:6.2f} s against {row['other_seconds']:6.2f} s: "
            f"{row['ratio']:5.2f} x ({row['ratio_min']:.2f} .. {row['ratio_max']:.2f}, "
            f"n = {row['repeats']}), processor time {row['processor_ratio']:.2f} x"
        )


if __name__ == "__main__":
    main()
