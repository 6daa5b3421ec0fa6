"""Reading batches from worker processes, any of which may be killed."""

from __future__ import annotations

from collections.abc import Iterator
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
        yield from loader
    except _BROKEN as error:
        if not workers or str(error).startswith("Caught "):  # then it is of the data
            raise
        hear_no_more_of_workers()
        raise RuntimeError("DataLoader worker (pid(s) 0) exited unexpectedly") from error
