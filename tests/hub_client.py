"""A process that talks to the hub of a test as a user's would: the client reads its environment
when it is imported, so it has to be a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Client:
    """Runs pieces of Python one after the other, or at once, in one process.

    In the pieces ``timm``, ``torch``, ``timm_structdrop`` and the public names of its hub room are
    there; what they assign to ``result`` comes back.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(env),
            cwd=ROOT,
            text=True,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()

    def run(self, code: str, **given: Any) -> Any:
        """The piece's result; `given` are JSON-able names for it."""
        return self.run_all([(code, given)])[0].value

    def error(self, code: str, **given: Any) -> Outcome:
        """How the piece failed."""
        outcome = self.run_all([(code, given)])[0]
        assert outcome.error, f"it worked: {outcome.value}"
        return outcome

    def run_all(self, pieces: list[tuple[str, dict[str, Any]]]) -> list[Outcome]:
        """The outcomes of pieces that run at the same time, so that they wait together."""
        self.process.stdin.write(json.dumps(pieces) + "\n")
        self.process.stdin.flush()
        answers = json.loads(self.process.stdout.readline())
        return [Outcome(**answer) for answer in answers]


@dataclass
class Outcome:
    """`result` of a piece, or the class and text of its error; warnings of the package."""

    given: Any = None
    kind: str = ""
    error: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def value(self) -> Any:
        assert not self.error, f"{self.kind}: {self.error}"
        return self.given


def main() -> None:
    import logging
    import os
    import threading
    import traceback
    import warnings
    from concurrent.futures import ThreadPoolExecutor

    import timm
    import torch

    import timm_structdrop
    import timm_structdrop.hub

    warnings.filterwarnings("error", module="timm_structdrop")
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    said: dict[int, list[str]] = {}
    names = {"timm": timm, "torch": torch, "timm_structdrop": timm_structdrop}
    names |= {name: getattr(timm_structdrop.hub, name) for name in timm_structdrop.hub.__all__}

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.setdefault(threading.get_ident(), []).append(record.getMessage())

    logging.getLogger("timm_structdrop").addHandler(Keep(level=logging.WARNING))

    def run(piece: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        code, given = piece
        space = {**names, **given}
        said[threading.get_ident()] = []
        try:
            exec(code, space)
            answer = {"given": space.get("result")}
        except Exception as error:
            if not isinstance(error, timm_structdrop.errors.UserError):
                traceback.print_exc()
            answer = {"kind": type(error).__name__, "error": str(error)}
        return {**answer, "warnings": said[threading.get_ident()]}

    with answers:
        for line in sys.stdin:
            pieces = json.loads(line)
            with ThreadPoolExecutor(len(pieces)) as pool:
                answers.write(json.dumps(list(pool.map(run, pieces))) + "\n")
            answers.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
