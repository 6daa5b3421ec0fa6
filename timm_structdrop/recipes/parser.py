"""A parser whose errors are one line, and the value of ``--structdrop``."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from timm.utils import ParseKwargs

from timm_structdrop.errors import UserError, nearest

__all__ = ["FlagParser", "Keywords", "at_least", "fraction", "parse_structdrop"]


class FlagParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that raises `UserError` with one line instead of printing its usage."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_flags(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse ``argv``, the command line by default; an unknown flag is an error with a hint."""
        parsed, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
            name = flags[0] if flags else unknown[0]
            raise UserError(f"unknown flag {name}{nearest(name, self._option_string_actions)}")
        return parsed

    def flags(self) -> dict[str, argparse.Action]:
        """The flags by the name that they have in YAML files and in the parsed namespace."""
        return {
            action.dest: action
            for action in self._actions
            if action.dest != "help" and action.default is not argparse.SUPPRESS
        }


class Keywords(ParseKwargs):
    """timm's action for ``key=value ...``, whose values are Python literals, else text."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for value in values:
            if value and "=" not in value:
                raise UserError(f"{option_string} must be key=value ...; got {value!r}")
        super().__call__(parser, namespace, values, option_string)


def parse_structdrop(text: str) -> tuple[str, dict[str, Any]]:
    """``name:key=value,...`` to the regularizer's name and its settings.

    Values are Python literals, else text: ``dropblock:stages=(3,4),block_size=7,gamma=exact``.

    Raises:
        UserError: a setting without ``=``.
    """
    name, _, rest = text.partition(":")
    settings = {}
    for part in re.split(r",(?![^(\[]*[)\]])", rest) if rest else []:
        key, equals, value = part.partition("=")
        if not (key and equals):
            raise UserError(f"--structdrop must be name:key=value,key=value,...; got {text!r}")
        try:
            settings[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key.strip()] = value
    return name, settings


def at_least(low: int | float) -> Callable[[str], int | float]:
    """A type of flag: numbers of the type of ``low`` that are not below it."""
    kind = type(low)

    def number(text: str) -> int | float:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"must be at least {low}; got {text}")
        return value

    number.__name__ = kind.__name__
    return number


def fraction(text: str) -> float:
    """A type of flag: probabilities and rates, in [0, 1]."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be in [0, 1]; got {text}")
    return value


fraction.__name__ = "float"
