"""Paired timing: what else the machine does meets both sides of a ratio."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

__all__ = ["Times", "compared", "one_thread", "paired", "spread", "weighted"]


class Times(NamedTuple):
    """Milliseconds of some calls: elapsed, and of the processor, which does not count waiting for
    one's turn on a busy machine."""

    elapsed: list[float]
    processor: list[float]


KINDS = range(len(Times._fields))


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch on one CPU thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def paired(
    functions: dict[str, Callable[[], object]], repeats: int, warm_up: int = 2, device: str = "cpu"
) -> dict[str, Times]:
    """Times of each call, the functions taking turns in ``repeats`` rounds, each beginning with
    another one. On a GPU a call ends when the device has done its work."""
    times = {name: Times([], []) for name in functions}
    names = list(functions)
    for round_ in range(-warm_up, repeats):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            elapsed, processor = time.perf_counter(), time.process_time()
            functions[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_ >= 0:
                times[name].elapsed.append(1000 * (time.perf_counter() - elapsed))
                times[name].processor.append(1000 * (time.process_time() - processor))
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def weighted(*parts: tuple[float, Times]) -> Times:
    """The sum, round by round, of times that each count so much."""
    rounds = range(len(parts[0][1].elapsed))
    return Times(
        *([sum(w * times[kind][r] for w, times in parts) for r in rounds] for kind in KINDS)
    )


def compared(ours: Times, other: Times) -> dict[str, Any]:
    """Ratios of one function to another, taken within each round of one :func:`paired`.

    Returns:
        ``ms`` and ``other_ms``, median and quartiles of the elapsed times, ``ratio``, those of
        their ratios, ``processor_ratio``, the median ratio of processor times, and ``repeats``.
    """
    elapsed, processor = (
        [a / b for a, b in zip(ours[kind], other[kind], strict=True)] for kind in KINDS
    )
    return {
        "ms": spread(ours.elapsed),
        "other_ms": spread(other.elapsed),
        "ratio": spread(elapsed),
        "processor_ratio": statistics.median(processor),
        "repeats": len(elapsed),
    }
