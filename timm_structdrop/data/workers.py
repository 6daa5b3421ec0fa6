"""Reading batches from worker processes, any of which may be killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

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
    workers = getattr(getattr(loader, "loader", loader), "num_workers", 0)
    try:
        with _quiet_workers():
            yield from loader
    except _BROKEN as error:
        if not workers or str(error).startswith("Caught "):  # then it is of the data
            raise
        hear_no_more_of_workers()
        raise RuntimeError("DataLoader worker (pid(s) 0) exited unexpectedly") from error


@contextmanager
def _quiet_workers() -> Iterator[None]:
    """Workers forked inside do not print that this process is no longer there to read from them:
    the thread that shares their tensors would, with a traceback, beside the line of the error."""
    usual, reader = sys.excepthook, os.getpid()

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if os.getpid() == reader or not issubclass(kind, _BROKEN):
            usual(kind, error, traceback)

    sys.excepthook = hook
    try:
        yield
    finally:
        sys.excepthook = usual
