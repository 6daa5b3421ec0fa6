"""Batches from worker processes, one of which dies while it is being read from."""

import os
import sys

import pytest

from timm_structdrop.data.workers import read_batches
from timm_structdrop.errors import dead_worker


class Broken:
    """A loader whose second batch ends in an error."""

    def __init__(self, error: Exception, num_workers: int) -> None:
        self.error = error
        self.num_workers = num_workers

    def __iter__(self):
        yield "batch"
        raise self.error


class Prefetching:
    """As timm's: the loader with the workers is inside."""

    def __init__(self, loader: Broken) -> None:
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


@pytest.mark.parametrize("wrap", [lambda loader: loader, Prefetching])
@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "gone")]
)
def test_a_broken_connection_to_a_worker_is_its_death(error, wrap):
    batches = read_batches(wrap(Broken(error, num_workers=2)))
    assert next(batches) == "batch"
    with pytest.raises(RuntimeError) as raised:
        next(batches)
    assert dead_worker(raised.value) is not None
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error, workers",
    [
        (FileNotFoundError(2, "no such image"), 0),
        (FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0."), 2),
        (ValueError("a sample is wrong"), 2),
    ],
)
def test_an_error_of_the_data_stays_what_it_is(error, workers):
    batches = read_batches(Broken(error, workers))
    next(batches)
    with pytest.raises(type(error)) as raised:
        next(batches)
    assert raised.value is error


def test_workers_are_silent_about_a_reader_that_is_gone(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: printed.append(kind))
    here = os.getpid()
    batches = read_batches(Broken(ValueError(), num_workers=2))
    next(batches)
    for process, kind in ((here, ConnectionResetError), (here + 1, ConnectionResetError),
                          (here + 1, EOFError), (here + 1, ValueError)):  # fmt: skip
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        sys.excepthook(kind, kind(), None)
    assert printed == [ConnectionResetError, ValueError]
    with pytest.raises(ValueError):
        next(batches)
    sys.excepthook(EOFError, EOFError(), None)
    assert printed[-1] is EOFError
