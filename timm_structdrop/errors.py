"""What a user can get wrong, said in one line."""

from __future__ import annotations

import difflib
import errno
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_is_command = ContextVar("is_command", default=False)
_USER_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP}
)
_USER_OS_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
# what torch's DataLoader raises, without a class of its own, wherever the main process is just then
_DEAD_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) "
    r"(?:is (killed by signal: \w[\w ]*)|exited unexpectedly(?: with (exit code \d+))?)"
)


class UserError(ValueError):
    """Something a user can get wrong. The message states the rule, then the value received.

    torch's DataLoader raises a worker's exception again in the main process as the same class
    with the whole traceback as its message; the original message is recovered from it here, so
    that the line a user reads does not depend on the number of workers.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_without_worker_traceback(type(self), message))


def _without_worker_traceback(kind: type, message: str) -> str:
    if not message.startswith(f"Caught {kind.__name__} "):
        return message
    last_raise = re.escape(f"{kind.__module__}.{kind.__qualname__}: ")
    starts = list(re.finditer(rf"^{last_raise}", message, flags=re.MULTILINE))
    return message[starts[-1].end() :].rstrip() if starts else message


def nearest(name: str, valid: Iterable[str], n: int = 3) -> str:
    """A hint to put behind an unknown name: `" (nearest: a, b, c)"`, closest first.

    At most `n` of `valid` are named, case ignored in the comparison; empty without valid names.
    """
    by_lower = {candidate.lower(): candidate for candidate in valid}
    close = difflib.get_close_matches(name.lower(), by_lower, n=n, cutoff=0.0)
    return f" (nearest: {', '.join(by_lower[match] for match in close)})" if close else ""


def unexpected_keyword(error: BaseException) -> tuple[str, str] | None:
    """Who got a keyword that it does not know, function or class, and which; None of other
    errors."""
    words = r"(\w+)\.?\S*\(\) got an unexpected keyword argument '(\w+)'"
    found = re.match(words, str(error)) if isinstance(error, TypeError) else None
    return (found[1], found[2]) if found else None


def dead_worker(error: BaseException) -> str | None:
    """One clause if the error is that a DataLoader's worker process died, else None."""
    died = _DEAD_WORKER.match(str(error)) if isinstance(error, RuntimeError) else None
    if died is None:
        return None
    how = died[1] or died[2]
    return (
        f"a worker process that reads images died{f' ({how})' if how else ''}; where memory is "
        "short, fewer --workers may help"
    )


def is_command() -> bool:
    """Whether `run_command` is under way: the process is a command's, and ends with it."""
    return _is_command.get()


def hear_no_more_of_workers() -> None:
    """Keep torch from raising (at SIGCHLD) that a worker died, in a command that is ending.

    Elsewhere the process is somebody else's, and so are its handlers: nothing happens.
    """
    if is_command() and threading.current_thread() is threading.main_thread():
        do_not_hear_of_workers()


def do_not_hear_of_workers() -> Any:
    """The same wherever it is called, in the main thread; returns the handler to put back."""
    # unlike SIG_IGN, a function takes a signal that has come but not been handled yet
    return signal.signal(signal.SIGCHLD, lambda number, frame: None) or signal.SIG_DFL


def one_line(error: BaseException) -> str:
    """The error's message on one line; operating system errors name the file they are about."""
    dead = dead_worker(error)
    if dead is not None:
        return dead
    if isinstance(error, OSError) and error.strerror:
        files = [str(file) for file in (error.filename, error.filename2) if file is not None]
        message = ": ".join([error.strerror, " -> ".join(files)] if files else [error.strerror])
    else:
        message = str(error)
    return " ".join(message.split()) or type(error).__name__


def is_users(error: BaseException) -> bool:
    """Whether the error is the user's to mend: a `UserError`, a file missing, a full disk, a worker
    process that was killed, ..."""
    if isinstance(error, OSError):
        return isinstance(error, _USER_OS_ERRORS) or error.errno in _USER_ERRNOS
    return isinstance(error, UserError) or dead_worker(error) is not None


def run_command(main: Callable[[], object]) -> None:
    """Run a command's `main` and turn what a user did wrong into one line on stderr, and so what
    they are warned of.

    Exit status: 2 after `error: <one line>`, 130 after Ctrl-C, 1 without a word when the reader of
    the output has gone (`... | head`). Any other exception is a bug and keeps its traceback.
    """
    outside = _is_command.set(True)
    try:
        with _plain_warnings():
            main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        if not _stdout_is_gone():
            raise
        sys.exit(1)
    except Exception as error:
        if not is_users(error):
            raise
        if dead_worker(error) is not None:
            hear_no_more_of_workers()
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    finally:
        _is_command.reset(outside)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings for users are one line; those for developers (deprecations and the like) keep their
    file and line."""
    usual = warnings.formatwarning

    def plain(message: Warning | str, category: type[Warning], *where: Any, **source: Any) -> str:
        if category is not UserWarning:
            return usual(message, category, *where, **source)
        return f"warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _stdout_is_gone() -> bool:
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False
