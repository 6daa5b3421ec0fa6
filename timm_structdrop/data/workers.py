"""Reading batches from worker processes, any of which may be killed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch.utils.data import DataLoader

from timm_structdrop.errors import hear_no_more_of_workers

__all__ = ["read_batches"]

# how the end of a worker looks to who is taking a batch from it just then
_BROKEN = (ConnectionError, EOFError, FileNotFoundError)


def read_batches(loader: Any) -> Iterator[Any]:
    """The batches of a torch ``DataLoader``, or of timm's ``PrefetchLoader`` around one.

    Raises:
        RuntimeError: a worker process died, in torch's words (``errors.dead_worker`` knows them)
            where torch has not noticed yet and fails in reading what it sent.
    """
    inner = getattr(loader, "loader", loader)
    workers = getattr(inner, "num_workers", 0)
    try:
        with _quiet_workers(inner):
            yield from loader
    except _BROKEN as error:
        if not workers or str(error).startswith("Caught "):  # then it is of the data
            raise
        hear_no_more_of_workers()
        raise RuntimeError("DataLoader worker (pid(s) 0) exited unexpectedly") from error


@contextmanager
def _quiet_workers(loader: Any) -> Iterator[None]:
    """Workers that the loader starts inside do not print that this process is no longer there to
    read from them: the thread that shares their tensors would, with a traceback, beside the line of
    the error."""
    if not isinstance(loader, DataLoader):
        yield
        return
    usual = loader.worker_init_fn
    loader.worker_init_fn = _QuietStart(usual)
    try:
        yield
    finally:
        loader.worker_init_fn = usual


class _QuietStart:
    """What a worker does first, and then what it would have done."""

    def __init__(self, then: Callable[[int], object] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        usual = sys.excepthook

        def hook(
            kind: type[BaseException], error: BaseException, traceback: TracebackType | None
        ) -> None:
            if not issubclass(kind, _BROKEN):
                usual(kind, error, traceback)

        sys.excepthook = hook
        if self.then is not None:
            self.then(worker)
