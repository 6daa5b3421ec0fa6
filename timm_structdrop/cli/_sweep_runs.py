"""Runs of a sweep: train.py in other processes, one lock a run, resumed where they were left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from filelock import lock_descriptor

from timm_structdrop.errors import UserError, one_line
from timm_structdrop.files import save_json
from timm_structdrop.recipes import Cell
from timm_structdrop.training import find_resume, read_summary

__all__ = ["Run", "Runner", "done_runs"]

TRAIN = ("-m", "timm_structdrop", "train")  # what Python is to run
POLL_SECONDS = 0.2
GRACE_SECONDS = 120  # a training ends after the update that is under way, and saves


@dataclass(frozen=True)
class Run:
    """One cell of a table with one seed.

    Attributes:
        cell: of the table.
        seed: of train.py, and of the share of the training images.
        folder: where train.py writes; files of the same name with another ending lie beside it:
            ``.log``, what it said; ``.json``, there once it has ended; ``.lock``, held while it
            runs, by itself too, so that nobody else starts it, even if the sweep was killed.
        epochs: of the whole run.
    """

    cell: Cell
    seed: int
    folder: Path
    epochs: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.folder.parent.name}, seed {self.seed}"

    def beside(self, ending: str) -> Path:
        """The file ``seed-0.log``, ... beside the folder."""
        return self.folder.with_name(f"{self.folder.name}.{ending}")

    def is_done(self) -> bool:
        """Whether it has trained to its end."""
        return self.beside("json").is_file()

    def epochs_done(self) -> int:
        """How many epochs have a row in its summary."""
        return len(read_summary(self.folder / "summary.csv"))

    def can_resume(self) -> bool:
        """Whether it left a checkpoint."""
        if not self.folder.is_dir():
            return False
        try:
            find_resume(self.folder)
        except UserError:
            return False
        return True

    def command(self, flags: Sequence[str]) -> list[str]:
        """The command that starts or continues it; ``flags`` of train.py come last."""
        if self.can_resume():
            words = ["--resume", str(self.folder)]
        else:
            words = ["--recipe", self.cell.name, "--seed", str(self.seed)]
            words += ["--output", str(self.folder.parent), "--experiment", self.folder.name]
            words += ["--checkpoint-hist", "1"]
        return [sys.executable, *TRAIN, *words, *flags]


def done_runs(folder: Path) -> dict[int, Path]:
    """The folders of a cell's runs that have trained to their end, by seed."""
    seeds = sorted(int(path.stem.split("-")[1]) for path in folder.glob("seed-*.json"))
    return {seed: folder / f"seed-{seed}" for seed in seeds}


@dataclass
class _Going:
    run: Run
    process: subprocess.Popen[bytes]
    lock: IO[str]
    slot: int


class Runner:
    """Does runs, some at a time, and returns when all have ended.

    Args:
        runs: those that are not done yet.
        flags: of train.py, behind its own.
        jobs: how many run at a time; each has its share of the CPU cores, and of several GPUs one.
        on_change: called with this object about five times a second, and whether a run has ended.
        stopped: asked as often; True ends the runs that are going, each after its update.

    Attributes:
        elsewhere: runs that are waited for, because another process does them.
        failures: what went wrong, by the run's name.
        was_stopped: whether ``stopped`` said so.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        flags: Sequence[str],
        jobs: int,
        on_change: Callable[[Runner, bool], None],
        stopped: Callable[[], bool],
    ) -> None:
        self.waiting = list(runs)
        self.flags = list(flags)
        self.jobs = jobs
        self.on_change = on_change
        self.stopped = stopped
        self.going: list[_Going] = []
        self.elsewhere: list[Run] = []
        self.failures: dict[str, str] = {}
        self.was_stopped = False
        self._any_done = False

    def run(self) -> None:
        """Do them. An interruption (Ctrl-C) reaches the runs too, and is passed on after them."""
        try:
            while (self.waiting and not self._hopeless()) or self.going:
                if self.stopped():
                    self.was_stopped = True
                    return
                started = self._start_some()
                ended = self._collect()
                self.on_change(self, ended)
                if not started and not ended:
                    time.sleep(POLL_SECONDS)
        finally:
            self._end_all()

    def running(self) -> list[Run]:
        """The runs that are going."""
        return [going.run for going in self.going]

    def _hopeless(self) -> bool:
        """A user's mistake before anything worked is likely to be in all runs."""
        return bool(self.failures) and not self._any_done

    def _start_some(self) -> bool:
        started = False
        self.elsewhere = []
        for run in list(self.waiting):
            if len(self.going) >= self.jobs or self._hopeless():
                break
            if run.is_done():  # by another sweep in this folder, or one that was killed
                self.waiting.remove(run)
                continue
            lock = _lock(run.beside("lock"))
            if lock is None:
                self.elsewhere.append(run)
                continue
            self.waiting.remove(run)
            self.going.append(self._start(run, lock))
            started = True
        return started

    def _start(self, run: Run, lock: IO[str]) -> _Going:
        slot = min(set(range(self.jobs)) - {going.slot for going in self.going})
        environment = dict(os.environ)
        if self.jobs > 1:
            threads = max(1, (os.cpu_count() or 1) // self.jobs)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        flags = list(self.flags)
        gpus = torch.cuda.device_count()
        if self.jobs > 1 and gpus > 1 and "--device" not in flags:
            flags += ["--device", f"cuda:{slot % gpus}"]
        command = run.command(flags)
        with open(run.beside("log"), "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock.fileno()] if os.name == "posix" else [],
            )
        return _Going(run, process, lock, slot)

    def _collect(self) -> bool:
        ended = [going for going in self.going if going.process.poll() is not None]
        for going in ended:
            self.going.remove(going)
            self._note(going)
        return bool(ended)

    def _note(self, going: _Going) -> None:
        run, code = going.run, going.process.returncode
        if code == 0:
            save_json({"cell": run.cell.name, "seed": run.seed}, run.beside("json"))
            self._any_done = True
        else:
            self.failures[run.name] = _what_happened(run, code)
        going.lock.close()

    def _end_all(self) -> None:
        for going in self.going:
            going.process.terminate()
        for going in self.going:
            try:
                going.process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                going.process.kill()
                going.process.wait()
            going.lock.close()
        self.going = []


def _what_happened(run: Run, code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"it was ended by {signal.Signals(-code).name}"
    lines = run.beside("log").read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line for line in reversed(lines) if line.strip()), "nothing")
    return said.removeprefix("error: ")


def _lock(path: Path) -> IO[str] | None:
    """An open file that nobody else has locked; None if somebody has. The lock ends with the last
    process that has the file open. UserError where the file system has no locks."""
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (it stays open, as the lock)
    try:
        # a FileLock would keep its descriptor to itself, and the run could not hold it too
        if lock_descriptor(file.fileno(), blocking=False):
            return file
    except OSError as error:
        file.close()
        raise UserError(f"a sweep needs locks on files; {path}: {one_line(error)}") from error
    file.close()
    return None
