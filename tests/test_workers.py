"""Batches from worker processes, one of which dies while it is being read from."""

import signal
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from timm_structdrop.data.workers import read_batches
from timm_structdrop.errors import dead_worker, run_command


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


class Hooked(Dataset):
    """How many of four errors the process that reads a sample would print at its end."""

    def __init__(self) -> None:
        self.printed = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> torch.Tensor:
        before = self.printed.clone()
        for kind in (ConnectionResetError, EOFError, FileNotFoundError, ValueError):
            sys.excepthook(kind, kind(), None)
        return self.printed - before


def test_workers_are_silent_about_a_reader_that_is_gone(monkeypatch):
    """And nothing is changed in the reader, where all four are printed."""
    data = Hooked()

    def usual(kind, error, traceback) -> None:
        data.printed += 1

    monkeypatch.setattr(sys, "excepthook", usual)
    for workers, printed in ((1, 1), (0, 4)):
        context = "fork" if workers else None
        loader = DataLoader(data, None, num_workers=workers, multiprocessing_context=context)
        for batch in read_batches(loader):
            assert batch == printed
            assert sys.excepthook is usual
        assert loader.worker_init_fn is None


class Started(Dataset):
    """Gives what ``worker_init_fn`` has left."""

    worker = -1

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return Started.worker


def note_worker(worker: int) -> None:
    Started.worker = worker


def test_workers_start_as_the_loader_says():
    loader = DataLoader(
        Started(), None, num_workers=1, worker_init_fn=note_worker, multiprocessing_context="fork"
    )
    assert list(read_batches(loader)) == [0, 0]


@pytest.mark.parametrize("command", [False, True])
def test_only_a_command_stops_hearing_of_workers(command):
    before = signal.getsignal(signal.SIGCHLD)
    heard = []

    def read() -> None:
        with pytest.raises(RuntimeError):
            list(read_batches(Broken(EOFError(), num_workers=2)))
        heard.append(signal.getsignal(signal.SIGCHLD) is before)

    try:
        run_command(read) if command else read()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert heard == [not command]
