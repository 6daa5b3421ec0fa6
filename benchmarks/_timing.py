"""Paired timing: what else the machine does meets both sides of a ratio."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread", "paired", "spread"]


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
    functions: dict[str, Callable[[], object]], repeats: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of each call, the functions taking turns in ``repeats`` rounds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(-warm_up, repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_ >= 0:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def spread(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of paired times."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    if len(ratios) < 2:
        return {"median": ratios[0], "low": ratios[0], "high": ratios[0]}
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}
