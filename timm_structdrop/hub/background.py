"""Pushes of a training run that is under way, in a process of their own."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

__all__ = ["RunPushes"]

_logger = logging.getLogger(__name__)


class RunPushes:
    """Pushes a run's folder every so many epochs, and once more at its end.

    A process of its own does it, beside the training: it can neither stop it nor hold it up, and
    takes no random number from it. While a push is under way no other is started. A push that fails
    is one warning line.

    Args:
        folder: the run's output folder.
        repo_id: ``user/name``, for the messages.
        command: what Python is to run to push the folder.
        every: epochs between pushes; 0 for one at the end.
    """

    def __init__(self, folder: Path, repo_id: str, command: Sequence[str], every: int = 0) -> None:
        self.folder = folder
        self.repo_id = repo_id
        self.command = command
        self.every = every
        self._running: tuple[subprocess.Popen[bytes], IO[bytes]] | None = None

    def after_epoch(self, epoch: int) -> None:
        """Push if it is time to, and there is a checkpoint; ``epoch`` is counted from 0."""
        due = self.every and (epoch + 1) % self.every == 0
        if not due or self._is_running():
            return
        self._report()
        if any(self.folder.glob("last.*")):
            self._start()

    def finish(self) -> None:
        """Push what the run ended with, and wait for it."""
        if self._running is not None and self._is_running():
            self._running[0].terminate()  # a push is one commit: half of one leaves nothing
            self._wait()
        else:
            self._report()
        _logger.info(f"Pushing to {self.repo_id}")
        self._start()
        if self._report():
            _logger.info(f"Pushed to {self.repo_id}")

    def _is_running(self) -> bool:
        return self._running is not None and self._running[0].poll() is None

    def _start(self) -> None:
        log = TemporaryFile()  # noqa: SIM115
        package = Path(__file__).parents[2]
        paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        process = subprocess.Popen(
            [sys.executable, *self.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **settings},
        )
        self._running = process, log

    def _wait(self) -> tuple[int, str]:
        """Exit status and output of the push under way."""
        assert self._running is not None
        process, log = self._running
        self._running = None
        with log:
            status = process.wait()
            log.seek(0)
            return status, log.read().decode(errors="replace")

    def _report(self) -> bool:
        """Wait for the push, if there is one; whether it was done."""
        if self._running is None:
            return False
        status, output = self._wait()
        if status == 0:
            return True
        lines = [line for line in output.splitlines() if line.strip()] or [f"exit status {status}"]
        cause = next((line for line in lines if line.startswith("error: ")), lines[-1])
        again = shlex.join(["python", *self.command])
        _logger.warning(f"Not pushed: {cause.removeprefix('error: ')}; to try again: {again}")
        return False
