"""Paired differences over seeds, and the correction for looking at many of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import stats

__all__ = ["Difference", "holm", "paired_difference"]


class Difference(NamedTuple):
    """Mean of n paired differences, its 95 % interval and the p value of a paired t test."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Of ours minus theirs at equal seeds; each maps seeds to a figure.

    Raises:
        ValueError: fewer than two seeds in common.
    """
    seeds = sorted(set(ours) & set(theirs))
    if len(seeds) < 2:
        raise ValueError(f"a paired difference needs at least 2 seeds in common; got {len(seeds)}")
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(seeds))
    if error == 0.0:
        return Difference(mean, mean, mean, 1.0 if mean == 0.0 else 0.0, len(seeds))
    half = float(stats.t.ppf(0.975, len(seeds) - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, len(seeds) - 1))
    return Difference(mean, mean - half, mean + half, p, len(seeds))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: the i-th smallest of m times m - i + 1, monotone, at most 1."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    worst = 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted
