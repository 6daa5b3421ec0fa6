"""Where the time of a training step with CamDrop goes.

    python -m benchmarks.camdrop [--repeats N] [--quick]

ResNet-50, CamDrop in groups 3 and 4 with its defaults. A step is the forward, the loss, the
backward and an SGD update. The parts are timed inside of the CamDrop step: a share of the processor
time of the same step, which other processes disturb much less than a difference of two steps. What
the layers cost outside of themselves (memory, caches) is only in the ratio to the plain step.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks._models import make_step
from benchmarks._settings import Settings
from benchmarks._text import milliseconds, ratio, table
from benchmarks._timing import compared, one_thread, paired
from timm_structdrop.layers import camdrop

TITLE = "CamDrop's parts"
ARCHITECTURE = "resnet50"
CPU_ONLY = True  # processor time says nothing of what a GPU does
SHAPES = ((16, 3, 128, 128), (8, 3, 224, 224))
QUICK_SHAPES = ((4, 3, 64, 64),)
MAPS, SEEDS, DROPPING = "class activation maps", "ranking, seeds and blocks", "dropping"


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

    backward = staticmethod(timed("backward", camdrop._ScaleAndDrop.backward))
    with ExitStack() as stack:
        for name in ("cam_drop_2d", "guidance", "drop_in_maps"):
            function = timed(name, getattr(camdrop, name))
            stack.enter_context(patch.object(camdrop, name, function))
        stack.enter_context(patch.object(camdrop._ScaleAndDrop, "backward", backward))
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


def run(settings: Settings) -> list[dict[str, Any]]:
    """One row per batch: the step over the plain one, and the shares of its parts."""
    with one_thread():
        return [row(shape, settings) for shape in settings.pick(SHAPES, QUICK_SHAPES)]


def row(shape: tuple[int, int, int, int], settings: Settings) -> dict[str, Any]:
    names = {"plain": ARCHITECTURE, "camdrop": f"{ARCHITECTURE}_camdrop"}
    steps = {kind: make_step(name, shape) for kind, name in names.items()}
    rounds = settings.rounds(5)
    times = paired(steps, rounds, warm_up=1)
    return {
        "shape": shape,
        **compared(times["camdrop"], times["plain"]),
        "shares": shares(steps["camdrop"], rounds),
    }


def headline(rows: list[dict[str, Any]]) -> str:
    found = "; ".join(
        f"{100 * sum(row['shares'].values()):.1f} % at batch {row['shape'][0]}, "
        f"{row['shape'][2]} px"
        for row in rows
    )
    return f"CamDrop's own code, of its {ARCHITECTURE} step: {found}."


def report(rows: list[dict[str, Any]]) -> list[str]:
    parts = list(rows[0]["shares"])
    return [
        f"{ARCHITECTURE}; {rows[0]['repeats']} rounds; parts in percent of the CamDrop step's "
        "processor time.",
        "",
        *table(
            ["batch", "plain step", "step / plain step", "processor time", *parts, "together"],
            [
                [
                    f"{row['shape'][0]} at {row['shape'][2]} px",
                    milliseconds(row["other_ms"]),
                    ratio(row["ratio"]),
                    f"{row['processor_ratio']:.2f}",
                    *(f"{100 * row['shares'][name]:.1f} %" for name in parts),
                    f"{100 * sum(row['shares'].values()):.1f} %",
                ]
                for row in rows
            ],
        ),
    ]


if __name__ == "__main__":
    from benchmarks._suite import alone

    alone("camdrop")
