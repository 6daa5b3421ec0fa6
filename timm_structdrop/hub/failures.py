"""What goes wrong between here and the Hub, in one line each, and what is worth another try."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from timm_structdrop.errors import UserError, is_users, one_line

__all__ = ["hub_errors", "is_away", "with_retries"]

_logger = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds; the client itself spends up to half a minute on some calls
CONFLICTS = (412,)
BUSY = (408, 429, 500, 502, 503, 504)

Result = TypeVar("Result")


@contextmanager
def hub_errors(doing: str, repo_id: str, instead: str = "") -> Iterator[None]:
    """Turn what fails within the block at the Hub, on the way to it or on the disk into a
    `UserError` that names the cause.

    Anything else passes as it is: it is a bug, or for somebody else to explain.

    Args:
        doing: what is not possible, as in ``cannot <doing> <repo_id>: <cause>``.
        repo_id: the repository, or what comes from it.
        instead: what else one can do, to put behind the cause.

    Raises:
        UserError: in place of the client's errors with an answer of the Hub, about names, tokens,
            offline mode or a download cut short, of connections, and of the operating system.
    """
    try:
        yield
    except UserError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = _cause(error)
        if cause is None:
            raise
        raise UserError(f"cannot {doing} {repo_id}: {cause}{instead}") from error


def with_retries(attempt: Callable[[], Result]) -> Result:
    """The result of ``attempt``, called again while the Hub is busy or was changed meanwhile, for
    `PATIENCE` seconds; calls that the client repeats by itself have used them up."""
    deadline = time.monotonic() + PATIENCE
    wait = 0.5
    while True:
        try:
            return attempt()
        except (HTTPError, OSError, RuntimeError) as error:
            seconds = _seconds_to_wait(error, wait)
            if seconds is None or time.monotonic() + seconds > deadline:
                raise
            _logger.info(f"The Hub answered {_status(error)}; again in {seconds:g} s")
        time.sleep(seconds)
        wait *= 2


def is_away(error: BaseException) -> bool:
    """Whether the Hub cannot be reached, or offline mode forbids it."""
    status = _status(error)
    if status is not None:
        return status >= 500
    found = _chain(error)
    return any(isinstance(link, OfflineModeIsEnabled) or _is_transport(link) for link in found)


def _seconds_to_wait(error: BaseException, wait: float) -> float | None:
    """None where another try makes no sense."""
    status = _status(error)
    if status in CONFLICTS:
        return wait
    if status not in BUSY:
        return None
    response = _http_error(error).response  # type: ignore[union-attr]
    asked = response.headers.get("Retry-After", "")
    return max(wait, float(asked)) if asked.isdigit() else wait


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _http_error(error: BaseException) -> HfHubHTTPError | None:
    """The answer of the Hub behind an error; some of the client's errors are without one."""
    for link in _chain(error):
        if isinstance(link, HfHubHTTPError) and link.response is not None:
            return link
    return None


def _status(error: BaseException) -> int | None:
    found = _http_error(error)
    return None if found is None else found.response.status_code


def _is_transport(error: BaseException) -> bool:
    """A connection that failed, in the words of the HTTP library that the client uses."""
    if isinstance(error, HfHubHTTPError):
        return False
    library = type(error).__module__.split(".")[0]
    return isinstance(error, ConnectionError | HTTPError) or library in ("requests", "urllib3")


def _cause(error: BaseException) -> str | None:
    """One clause; None for what is not the Hub's, the network's or the disk's doing."""
    if isinstance(error, HFValidationError):
        return f"a repository is named user/name; {one_line(error)}"
    links = list(_chain(error))
    if any(isinstance(link, OfflineModeIsEnabled) for link in links):
        return "offline mode is on; unset HF_HUB_OFFLINE"
    if any(isinstance(link, LocalTokenNotFoundError) for link in links):
        return "there is no token; run `hf auth login` or set HF_TOKEN"
    response_error = _http_error(error)
    if response_error is not None:
        return _cause_of_status(response_error)
    for link in links:
        # the client's word for "neither there nor in the cache", whose cause comes further on
        if is_users(link) and not isinstance(link, LocalEntryNotFoundError):
            return one_line(link)
    for link in links:
        if isinstance(link, OSError) and "Consistency check failed" in str(link):
            return "a download ended early, its size is wrong; try again"
    if any(_is_transport(link) for link in links):
        return f"{constants.ENDPOINT} cannot be reached, or broke off ({_reason(links)})"
    if isinstance(error, OSError):
        return one_line(error)
    if "LFS" in str(error) or "README.md" in str(error) or "Malformed" in str(error):
        return f"the Hub refused: {one_line(error)}"
    return None


def _reason(links: list[BaseException]) -> str:
    """The root of it, without the words of every library on the way."""
    return next((one_line(link) for link in reversed(links) if str(link)), "no answer")


def _cause_of_status(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = error.response.headers.get("X-Error-Message") or error.server_message
    reply = f"the Hub answered {status}" + (f" ({' '.join(said.split())})" if said else "")
    return f"{reply}; {_advice(error, status)}"


def _advice(error: HfHubHTTPError, status: int) -> str:
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision"
    if isinstance(error, EntryNotFoundError):
        return "there is no such file"
    if isinstance(error, GatedRepoError):
        return "ask for access on its page, then run `hf auth login`"
    if status == 401:
        return "no valid token, or no such repository: run `hf auth login` or set HF_TOKEN"
    if status == 403:
        return "the token does not allow this: use one with write access to that name"
    if status == 404 or isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or the token may not see it"
    if status == 409:
        return "something of that name is already there"
    if status == 412:
        return "someone else keeps changing the repository: try again"
    if status == 429:
        return "too many requests: try again later"
    if status >= 500:
        return "that is a problem of the Hub: try again later"
    return "the request was not understood"
