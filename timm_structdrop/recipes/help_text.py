"""How ``--help`` looks: a short usage, paragraphs that fill the terminal, useful defaults."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import Any

__all__ = ["HelpText", "short_usage"]

WIDEST = 100  # columns


class HelpText(argparse.HelpFormatter):
    """Descriptions keep their paragraphs and indented examples; a flag's default stands behind its
    help unless it is nothing (None, off, '' or an empty list), of which the help says what it
    means."""

    def __init__(self, prog: str, **settings: Any) -> None:
        columns = min(shutil.get_terminal_size().columns, WIDEST)
        super().__init__(prog, max_help_position=26, width=columns - 2, **settings)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            paragraph if paragraph.startswith(" ") else textwrap.fill(paragraph, width)
            for paragraph in text.strip("\n").split("\n\n")
        )

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        nothing = default is None or default is False or default in ("", [], {})
        if nothing or default is argparse.SUPPRESS or not action.option_strings:
            return action.help
        values = default if isinstance(default, list) else [default]
        return f"{action.help} (default: {' '.join(map(_as_typed, values))})".replace("%", "%%")


def _as_typed(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_usage(parser: argparse.ArgumentParser) -> str:
    """What must be given, in order, and that there are flags."""
    words = ["%(prog)s"]
    for action in parser._actions:
        name = str(action.metavar or action.dest).upper() if not action.option_strings else ""
        if name:
            words.append(f"[{name}]" if action.nargs == "?" else name)
        elif action.required:
            words.append(f"{action.option_strings[-1]} {action.metavar or action.dest.upper()}")
    return " ".join([*words, "[flags]"])
