"""Which figure ranks the epochs of a run, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Ranking"]


@dataclass(frozen=True)
class Ranking:
    """What checkpoints, the plateau schedule and the closing lines mean by the best epoch.

    Attributes:
        part: "validation" or "train", whose figures are compared.
        metric: "top1", "top5" or "loss".
    """

    part: str
    metric: str

    @classmethod
    def of_run(cls, eval_metric: str, evaluated: bool) -> Ranking:
        """By ``eval_metric`` of the evaluation; by the training loss where there is none."""
        return cls("validation", eval_metric) if evaluated else cls("train", "loss")

    @property
    def decreasing(self) -> bool:
        """Whether a lower figure is better."""
        return self.metric == "loss"

    @property
    def words(self) -> str:
        """For people: ``validation top1``, ``training loss``."""
        return f"{'training' if self.part == 'train' else self.part} {self.metric}"

    def figure(self, result: Mapping[str, Any]) -> float | None:
        """The figure of an epoch.

        Args:
            result: one of those that `fit` returns.

        Returns:
            None for an epoch that was not evaluated.
        """
        return result[self.part][self.metric] if self.part in result else None

    def sort_key(self, result: Mapping[str, Any]) -> float:
        """Sorts results so that the best one is the last; those without a figure are the first."""
        figure = self.figure(result)
        if figure is None:
            return -math.inf
        return -figure if self.decreasing else figure
