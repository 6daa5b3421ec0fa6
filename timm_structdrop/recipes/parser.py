"""A parser whose errors are one line, and the types of its flags."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from timm.utils import ParseKwargs

from timm_structdrop.errors import UserError, nearest
from timm_structdrop.recipes.help_text import HelpText, short_usage

__all__ = [
    "FlagParser",
    "Keywords",
    "at_least",
    "check_choice",
    "fraction",
    "parse_structdrop",
    "rate",
    "share",
]


class FlagParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that raises `UserError` with one line instead of printing its usage.

    Flags are not abbreviated: what is unknown is an error with the nearest names.
    """

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", HelpText)
        super().__init__(allow_abbrev=False, **settings)
        self.register("type", int, _whole_number)
        self.register("type", float, _number)

    def error(self, message: str) -> NoReturn:
        of_rule = (
            r"\1 \2"
            if re.match(r"argument \S+: (must|expected|not allowed)", message)
            else r"\1: \2"
        )
        raise UserError(re.sub(r"^argument (\S+): (.*)", of_rule, message, flags=re.DOTALL))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            check_choice(action, value)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(action, str(error)) from error

    def format_help(self) -> str:
        """The help with a usage of the names alone: the flags are listed below it."""
        self.usage = self.usage or short_usage(self)
        return super().format_help()

    def parse_flags(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse ``argv``, the command line by default.

        Raises:
            UserError: a flag is unknown or has a value that it does not take, or something is
                missing.
        """
        parsed, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
            if not flags:
                raise UserError(f"there is nothing that takes the argument {unknown[0]!r}")
            raise UserError(
                f"unknown flag {flags[0]}{nearest(flags[0], self._option_string_actions)}"
            )
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


def check_choice(action: argparse.Action, value: Any) -> None:
    """Raise ``argparse.ArgumentTypeError`` for a value that is not one of the flag's choices."""
    if action.choices is None or value in action.choices:
        return
    names = [str(choice) for choice in action.choices]
    rule = f"one of {', '.join(name or repr(name) for name in names)}" if names[1:] else names[0]
    hint = nearest(str(value), names) if len(names) > 3 else ""
    raise argparse.ArgumentTypeError(f"must be {rule}; got {value!r}{hint}")


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
    convert = _whole_number if isinstance(low, int) else _number

    def number(text: str) -> int | float:
        value = convert(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"must be at least {low}; got {text}")
        return value

    number.__name__ = type(low).__name__
    return number


def fraction(text: str) -> float:
    """A type of flag: probabilities, in [0, 1]."""
    value = _number(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be in [0, 1]; got {text}")
    return value


def rate(text: str) -> float:
    """A type of flag: drop rates, in [0, 1)."""
    value = _number(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"must be in [0, 1); got {text}")
    return value


def share(text: str) -> float:
    """A type of flag: shares of a whole, in (0, 1]."""
    value = _number(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be in (0, 1]; got {text}")
    return value


for _of_floats in (fraction, rate, share):
    _of_floats.__name__ = "float"


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number; got {text!r}") from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number; got {text!r}") from error
