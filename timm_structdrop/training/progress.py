"""Progress for people: one updating line in a terminal, log lines everywhere else."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from typing import TextIO

__all__ = ["Progress", "format_seconds", "redraw", "time_left"]

REDRAW_SECONDS = 0.1


def format_seconds(seconds: float) -> str:
    """``0:07``, ``12:34`` or ``5:04:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def time_left(seconds: float, done: int, left: int | None) -> str:
    """``0:12 left`` of what goes on as in the ``seconds`` so far, or ``0:14``, these themselves,
    where nothing is done yet, nothing left, or nobody knows."""
    if done <= 0 or not left:
        return format_seconds(seconds)
    return f"{format_seconds(seconds / done * left)} left"


def redraw(line: str, stream: TextIO) -> None:
    """Put a line in place of a terminal's last one, cut to its width."""
    columns = shutil.get_terminal_size().columns
    stream.write("\r\x1b[2K" + line[: columns - 1])
    stream.flush()


class Progress:
    """How far a pass over a loader is: title, step, figures, images/s and the time left.

    In a terminal one line is redrawn at most ten times a second and stays at the end of the pass.
    Elsewhere a line is printed for the first step, every ``log_interval`` steps and at the end.

    Args:
        title: what is running: ``Train 3/20``, ``Validate``.
        total: steps of the pass, or None where a loader has no length.
        log_interval: steps between lines outside a terminal, at least 1.
        done: steps of the pass that a run being continued has behind it.
        stream: where to write, stderr by default.
        enabled: False on every process but the first of a distributed run.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        log_interval: int = 50,
        done: int = 0,
        stream: TextIO | None = None,
        enabled: bool = True,
    ) -> None:
        self.title = title
        self.total = total
        self.log_interval = max(1, log_interval)
        self.first = self.step = done
        self.stream = stream if stream is not None else sys.stderr
        self.enabled = enabled
        self.live = self.stream.isatty()
        self.images = 0
        self.started = time.perf_counter()
        self._drawn_at = 0.0
        self._shown_step = -1
        self._figures: dict[str, float] = {}

    def update(self, images: int, figures: Mapping[str, float]) -> None:
        """One step is done: ``images`` more were seen, ``figures`` (name: value) are current."""
        self.step += 1
        self.images += images
        self._figures = dict(figures)
        if not self.enabled:
            return
        if self.live:
            now = time.perf_counter()
            if now - self._drawn_at >= REDRAW_SECONDS:
                self._drawn_at = now
                redraw(self.line(), self.stream)
        elif self.step - 1 == self.first or self.step % self.log_interval == 0:
            self._print()

    def close(self, note: str = "") -> None:
        """End of the pass: the last line stays, with ``note`` behind it."""
        if not self.enabled:
            return
        if self.live:
            redraw(self.line(note), self.stream)
            print(file=self.stream, flush=True)
        elif self._shown_step != self.step or note:
            self._print(note)

    def line(self, note: str = "") -> str:
        """The line as it stands, with ``note`` behind it."""
        seconds = time.perf_counter() - self.started
        steps = f"{self.step}/{self.total}" if self.total is not None else f"{self.step}"
        parts = [f"{self.title}  [{steps}]"]
        parts += [f"{name} {_short(value)}" for name, value in self._figures.items()]
        parts.append(f"{self.images / max(seconds, 1e-9):.0f} images/s")
        left = None if self.total is None else max(0, self.total - self.step)
        parts.append(time_left(seconds, self.step - self.first, left))
        return "  ".join([*parts, note] if note else parts)

    def _print(self, note: str = "") -> None:
        self._shown_step = self.step
        print(self.line(note), file=self.stream, flush=True)


def _short(value: float) -> str:
    """Four digits that matter; small rates in scientific notation."""
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
