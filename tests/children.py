"""train.py and the like as processes of their own, which start at once: they are forked from one
that has imported torch, and can be killed."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PATH = [str(ROOT / "tests"), str(ROOT)]


class Child:
    """A process that runs a command, at the head of a process group of its own.

    Args:
        command: "train", "validate", "timm_structdrop" (its subcommands), "tools.card", or "load":
            build the model that a folder holds, and write down which files are opened.
        argv: its arguments.
        log: what it writes to stdout and stderr.
        env: variables of its environment.
        offline: whether it may not open a connection to anywhere.
    """

    def __init__(
        self,
        command: str,
        argv: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        offline: bool = False,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["children_imports"])
        self.log = log
        log.touch()
        paths = [*PATH, *filter(None, [os.environ.get("PYTHONPATH")])]
        with _environment({"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}):
            self.process = context.Process(
                target=_enter, args=(command, list(argv), str(log), dict(env or {}), offline)
            )
            self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def said(self) -> str:
        """What it has written so far."""
        return self.log.read_text()

    def wait_until(self, there: Callable[[], Any], seconds: float = 120) -> Any:
        """The first true value of `there` while the process runs."""
        deadline = time.monotonic() + seconds
        while not (found := there()):
            assert self.process.exitcode is None, self.said
            assert time.monotonic() < deadline, f"it is not getting there: {self.said}"
            time.sleep(0.002)
        return found

    def wait_for_words(self, words: str) -> None:
        self.wait_until(lambda: words in self.said)

    def signal(self, number: int, group: bool = False) -> None:
        """To the process, or to all of its group: workers too."""
        (os.killpg if group else os.kill)(self.pid, number)

    def limit_files(self, size: int) -> None:
        """From now on its files end after `size` bytes."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def kill(self) -> None:
        """SIGKILL to all of the group."""
        self.signal(signal.SIGKILL, group=True)
        self.process.join()

    def end(self, seconds: float = 120) -> int:
        """Its exit status; it has to end within `seconds`."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"it does not end: {self.said}")
        return self.process.exitcode

    def children(self) -> list[int]:
        """Processes that it has started: the workers of its loaders."""
        listed = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in listed.split()]


def _environment(values: Mapping[str, str]) -> Any:
    from unittest.mock import patch

    return patch.dict(os.environ, values)


def _enter(command: str, argv: list[str], log: str, env: dict[str, str], offline: bool) -> None:
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # of workers; here it is "forkserver"
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(env)
    if offline:
        sys.addaudithook(_refuse_connections)
    import torch

    torch.set_num_threads(1)
    if command == "load":
        _load(argv[0])
        return
    from script import load_script

    from timm_structdrop.errors import run_command

    if command in ("train", "validate"):
        module = load_script(command)
    else:
        module = import_module(command if "." in command else f"{command}.__main__")
    run_command(lambda: module.main(argv))


def _refuse_connections(event: str, args: tuple[Any, ...]) -> None:
    """Names are not looked up and nothing is sent beyond this machine's own sockets of files."""
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        raise RuntimeError(f"it looks up {args[0]}")
    if event in ("socket.connect", "socket.sendto") and not isinstance(args[1], (str, bytes)):
        raise RuntimeError(f"it connects to {args[1]}")


def _load(folder: str) -> None:
    import timm

    def tell(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)):
            os.write(1, b"opened " + os.fsencode(args[0]) + b"\n")

    sys.addaudithook(tell)
    try:
        timm.create_model(f"local-dir:{folder}", pretrained=True)
        os.write(1, b"loaded\n")
    except Exception as error:
        os.write(1, f"refused {type(error).__name__}: {error}\n".encode())
