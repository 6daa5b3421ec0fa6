"""What people see while a pass runs, in a terminal and in a log."""

import io
import re

import pytest

from timm_structdrop.training import progress as module
from timm_structdrop.training.progress import Progress, format_seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(module.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_a_log_has_a_line_at_the_first_step_each_interval_and_the_end(clock):
    log = io.StringIO()
    progress = Progress("Train 1/2", 7, log_interval=3, stream=log)
    for step in range(7):
        clock.now += 2.0
        progress.update(10, {"loss": 1 / (step + 1), "lr": 1e-4})
    progress.close()
    lines = log.getvalue().splitlines()
    assert [re.search(r"\[(\d)/7\]", line)[1] for line in lines] == ["1", "3", "6", "7"]
    assert lines[0] == "Train 1/2  [1/7]  loss 1  lr 1.00e-04  5 images/s  0:12 left"
    assert lines[-1] == "Train 1/2  [7/7]  loss 0.1429  lr 1.00e-04  5 images/s  0:14"


def test_a_terminal_has_one_line_that_is_redrawn(clock):
    terminal = Terminal()
    progress = Progress("Validate", 100, stream=terminal)
    for _ in range(100):
        clock.now += 0.05
        progress.update(4, {"top1": 50.0})
    progress.close("done")
    drawn = terminal.getvalue()
    assert drawn.count("\n") == 1 and drawn.endswith("done\n")
    assert 30 <= drawn.count("\r") <= 52, "at most ten times a second"
    assert all(len(part) <= 85 for part in drawn.split("\r"))
    assert "[100/100]  top1 50  80 images/s  0:05  done" in drawn


def test_a_line_is_cut_to_the_terminals_width(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    terminal = Terminal()
    progress = Progress("A long title for a pass", 5, stream=terminal)
    clock.now += 1
    progress.update(1, {"loss": 1.0})
    assert terminal.getvalue() == "\r\x1b[2KA long title for a "


def test_the_time_left_counts_only_steps_of_this_process(clock):
    progress = Progress("Train", 10, done=6, stream=io.StringIO())
    clock.now += 3.0
    progress.update(1, {})
    assert "[7/10]" in progress.line() and "0:09 left" in progress.line()


def test_other_processes_are_silent():
    log = io.StringIO()
    progress = Progress("Train", 1, stream=log, enabled=False)
    progress.update(1, {"loss": 1.0})
    progress.close()
    assert log.getvalue() == ""


def test_without_a_length_there_is_no_time_left(clock):
    progress = Progress("Train", None, stream=io.StringIO())
    clock.now += 65
    progress.update(1, {})
    assert progress.line() == "Train  [1]  0 images/s  1:05"


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "0:07"), (754, "12:34"), (18243, "5:04:03")])
def test_times(seconds, text):
    assert format_seconds(seconds) == text
