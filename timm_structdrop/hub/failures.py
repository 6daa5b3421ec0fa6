"""What goes wrong between here and the Hub: what its client leaves to its users.

The client repeats single requests (those of an upload; in recent releases others too) and, asked
for one file, falls back to its cache. `with_retries` repeats a whole attempt, also after a commit
in between, which asks for another parent. The client's errors are many lines, in the words of
several libraries: `hub_errors` makes one line of them, with advice.
"""

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
    RevisionNotFoundError,
)

from timm_structdrop.errors import UserError, is_users, one_line

__all__ = ["hub_errors", "is_away", "with_retries"]

_logger = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds; the client itself spends up to half a minute on some calls
WORTH_ANOTHER_TRY = (408, 412, 429, 500, 502, 503, 504)  # 412: a commit in between
ADVICE_OF_CLASS = {
    RevisionNotFoundError: "there is no such revision",
    EntryNotFoundError: "there is no such file",
    GatedRepoError: "ask for access on its page, then run `hf auth login`",
}
ADVICE_OF_STATUS = {
    401: "no valid token, or no such repository: run `hf auth login` or set HF_TOKEN",
    403: "the token does not allow this: use one with write access to that name",
    404: "there is no such repository, or the token may not see it",
    409: "something of that name is already there",
    412: "someone else keeps changing the repository: try again",
    429: "too many requests: try again later",
}

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
            answered = _answered(error)
            if answered is None or answered.response.status_code not in WORTH_ANOTHER_TRY:
                raise
            asked = answered.response.headers.get("Retry-After", "")
            seconds = max(wait, float(asked)) if asked.isdigit() else wait
            if time.monotonic() + seconds > deadline:
                raise
            status = answered.response.status_code
            _logger.info(f"The Hub answered {status}; again in {seconds:g} s")
        time.sleep(seconds)
        wait *= 2


def is_away(error: BaseException) -> bool:
    """Whether the Hub cannot be reached, or offline mode forbids it."""
    answered = _answered(error)
    if answered is not None:
        return answered.response.status_code >= 500
    found = _chain(error)
    return any(isinstance(link, OfflineModeIsEnabled) or _is_transport(link) for link in found)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _answered(error: BaseException) -> HfHubHTTPError | None:
    """The answer of the Hub behind an error; some of the client's errors are without one."""
    for link in _chain(error):
        if isinstance(link, HfHubHTTPError) and link.response is not None:
            return link
    return None


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
    answered = _answered(error)
    if answered is not None:
        return _cause_of_answer(answered)
    for link in links:
        # the client's word for "neither there nor in the cache", whose cause comes further on
        if is_users(link) and not isinstance(link, LocalEntryNotFoundError):
            return one_line(link)
    for link in links:
        if isinstance(link, OSError) and "Consistency check failed" in str(link):
            return "a download ended early, its size is wrong; try again"
    if any(_is_transport(link) for link in links):
        # the root of it, without the words of every library on the way
        reason = next((one_line(link) for link in reversed(links) if str(link)), "no answer")
        return f"{constants.ENDPOINT} cannot be reached, or broke off ({reason})"
    if isinstance(error, OSError):
        return one_line(error)
    if "LFS" in str(error) or "README.md" in str(error) or "Malformed" in str(error):
        return f"the Hub refused: {one_line(error)}"
    return None


def _cause_of_answer(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = error.response.headers.get("X-Error-Message") or error.server_message
    reply = f"the Hub answered {status}" + (f" ({' '.join(said.split())})" if said else "")
    return f"{reply}; {_advice(error, status)}"


def _advice(error: HfHubHTTPError, status: int) -> str:
    for kind, advice in ADVICE_OF_CLASS.items():
        if isinstance(error, kind):
            return advice
    if status >= 500:
        return "that is a problem of the Hub: try again later"
    return ADVICE_OF_STATUS.get(status, "the request was not understood")
