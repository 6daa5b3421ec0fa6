"""Ending a run when the machine asks for it: after the update that is under way."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from timm_structdrop.errors import do_not_hear_of_workers, is_command

__all__ = ["StopRequest", "TrainingStopped"]


class TrainingStopped(Exception):
    """The process was asked to end (SIGTERM); the run is saved as it stands."""


class StopRequest:
    """Within its ``with`` block SIGTERM does not kill the process but sets ``requested``.

    What ends a run often tells all of its processes at once, and a DataLoader's workers die of it.
    Torch would raise that in the middle of the update (SIGCHLD), so from the request on it no
    longer hears of it, and finds out when it waits for a batch of theirs. After the block both
    signals have the handlers of before; only a command, which ends now, goes on not to hear.

    Outside the main thread, where Python cannot take signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None
        self._before_of_workers: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
        if self._before_of_workers is not None and not is_command():
            signal.signal(signal.SIGCHLD, self._before_of_workers)
            self._before_of_workers = None

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._before_of_workers is None:
            self._before_of_workers = do_not_hear_of_workers()
        self.requested = True
