"""Paired timing: what else the machine does meets both sides of a ratio."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

__all__ = ["Times", "one_thread", "paired", "paired_times", "spread"]


class Times(NamedTuple):
    """Milliseconds of some calls: elapsed, and of the processor, which does not count waiting for
    one's turn on a busy machine."""

    elapsed: list[float]
    processor: list[float]


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch on one CPU thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def paired_times(
    functions: dict[str, Callable[[], object]], repeats: int, warm_up: int = 2
) -> dict[str, Times]:
    """Times of each call, the functions taking turns in ``repeats`` rounds, each beginning with
    another one."""
    times = {name: Times([], []) for name in functions}
    names = list(functions)
    for round_ in range(-warm_up, repeats):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            elapsed, processor = time.perf_counter(), time.process_time()
            functions[name]()
            if round_ >= 0:
                times[name].elapsed.append(1000 * (time.perf_counter() - elapsed))
                times[name].processor.append(1000 * (time.process_time() - processor))
    return times


def paired(
    functions: dict[str, Callable[[], object]], repeats: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Elapsed milliseconds of each call; see :func:`paired_times`."""
    return {n: times.elapsed for n, times in paired_times(functions, repeats, warm_up).items()}


def spread(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of paired times."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    if len(ratios) < 2:
        return {"median": ratios[0], "low": ratios[0], "high": ratios[0]}
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}
