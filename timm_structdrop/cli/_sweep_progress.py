"""How far a sweep is: cells, runs, epochs, and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from timm_structdrop.cli._sweep_runs import Run
from timm_structdrop.training.progress import redraw, time_left
from timm_structdrop.words import counted

__all__ = ["SweepProgress"]

LINE_SECONDS = 60.0
REDRAW_SECONDS = 0.5


class SweepProgress:
    """A line that is redrawn in a terminal; elsewhere a line for every run that ends and every
    minute.

    Args:
        title: of the sweep.
        runs: all of them, those of before too.
    """

    def __init__(self, title: str, runs: Sequence[Run]) -> None:
        self.title = title
        self.runs = list(runs)
        self.started = time.perf_counter()
        self.epochs_before = self._epochs()
        self.live = sys.stderr.isatty()
        self._shown_at: float | None = None

    def show(self, running: Sequence[Run], elsewhere: Sequence[Run], now: bool = False) -> None:
        """Show the line if it is time to, or ``now``.

        Args:
            running: runs of this sweep that are going.
            elsewhere: runs that go on in processes of others, and are waited for.
            now: whether something has just ended.
        """
        at = time.perf_counter()
        pause = REDRAW_SECONDS if self.live else LINE_SECONDS
        if self._shown_at is not None and not now and at - self._shown_at < pause:
            return
        self._shown_at = at
        line = self.line(running, elsewhere)
        if self.live:
            redraw(line, sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """In a terminal, the line stays."""
        if self.live and self._shown_at is not None:
            print(file=sys.stderr)

    def line(self, running: Sequence[Run], elsewhere: Sequence[Run] = ()) -> str:
        """The line as it stands."""
        open_runs = [run for run in self.runs if not run.is_done()]
        cells = {run.cell.name for run in self.runs}
        done_cells = len(cells - {run.cell.name for run in open_runs})
        done_runs = len(self.runs) - len(open_runs)
        parts = [
            f"{self.title}  [{done_cells}/{len(cells)} cells, {done_runs}/{len(self.runs)} runs]"
        ]
        parts += [
            f"{run.name}: {run.epochs_done()} of {counted(run.epochs, 'epoch')}"
            for run in running[:3]
        ]
        if elsewhere:
            parts.append(f"{elsewhere[0].name} goes on in another process")
        seconds = time.perf_counter() - self.started
        epochs, total = self._epochs(), sum(run.epochs for run in self.runs)
        return "  ".join([*parts, time_left(seconds, epochs - self.epochs_before, total - epochs)])

    def _epochs(self) -> int:
        return sum(
            run.epochs if run.is_done() else min(run.epochs, run.epochs_done()) for run in self.runs
        )
