"""How a paper makes one figure of a run: which epochs of ``summary.csv`` count, and how."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timm_structdrop.errors import UserError

__all__ = ["Metric", "is_of_a_run", "parse_metric"]

RULE = re.compile(r"(mean|median) of the (last|best) ([1-9]\d*) epochs")
FIGURE = re.compile(r"(top1|top5|error|error5)(?:@(\d+)%)?")
COLUMNS = {"top1": "top1", "top5": "top5", "error": "top1", "error5": "top5"}


def is_of_a_run(figure: str) -> bool:
    """Whether a figure can be computed from the epochs of a run: ``top1``, ``top5`` (accuracies),
    ``error``, ``error5`` (100 minus these), each also as ``top1@20%``."""
    return FIGURE.fullmatch(figure) is not None


@dataclass(frozen=True)
class Metric:
    """A rule such as ``mean of the last 50 epochs``, ``best`` or ``last``.

    Attributes:
        text: the rule as it is written in a table.
        statistic: ``mean`` or ``median`` of the chosen epochs.
        which: ``last`` or ``best``, by the figure itself: each has epochs of its own.
        epochs: how many are chosen; all of them where a run has fewer.
    """

    text: str
    statistic: str
    which: str
    epochs: int

    def words(self) -> str:
        """The rule in a sentence."""
        return f"the {self.text} epoch" if self.text in ("last", "best") else f"the {self.text}"

    def of(self, rows: Sequence[Mapping[str, str]], figure: str) -> float | None:
        """The figure of a run, in percent.

        Args:
            rows: of ``summary.csv``; epochs without an evaluation do not count.
            figure: see `is_of_a_run`; ``top1@20%`` counts only the first 20 % of the epochs.

        Returns:
            None if the figure is not one of a run, or no epoch counts.
        """
        match = FIGURE.fullmatch(figure)
        if match is None:
            return None
        name, percent = match.groups()
        column = f"eval_{COLUMNS[name]}"
        if percent is not None:
            rows = rows[: max(1, round(int(percent) / 100 * len(rows)))]
        values = [float(row[column]) for row in rows if row.get(column)]
        if not values:
            return None
        if name.startswith("error"):
            values = [100 - value for value in values]
        if self.which == "best":
            values.sort(reverse=name.startswith("error"))
        chosen = values[-self.epochs :]
        return statistics.median(chosen) if self.statistic == "median" else statistics.mean(chosen)


def parse_metric(text: str) -> Metric:
    """A rule from its text.

    Raises:
        UserError: it is none of ``last``, ``best`` and ``mean | median of the last | best N
            epochs``.
    """
    if text in ("last", "best"):
        return Metric(text, "mean", text, 1)
    match = RULE.fullmatch(text)
    if match is None:
        raise UserError(
            f"a metric must be last, best, or mean|median of the last|best N epochs; got {text!r}"
        )
    statistic, which, epochs = match.groups()
    return Metric(text, statistic, which, int(epochs))
