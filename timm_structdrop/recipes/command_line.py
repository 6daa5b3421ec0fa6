"""The command that a training's saved flags stand for."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from typing import Any

from timm_structdrop.recipes import parse_with_sources, recipe_names, train_parser

__all__ = ["training_command"]

# Flags that do not change what is trained, or that a recipe's flags are merged from.
LEFT_OUT = ("recipe", "config", "resume", "output", "experiment", "log_interval")


def training_command(flags: Mapping[str, Any]) -> str:
    """A line for the shell: the recipe, the seed, and every flag that differs from the recipe.

    Args:
        flags: as a run's `args.yaml` holds them.
    """
    parser = train_parser()
    recipe = str(flags.get("recipe"))
    words = ["--recipe", recipe] if recipe in recipe_names() else []
    usual = vars(parse_with_sources(train_parser(), words))
    for name, action in parser.flags().items():
        value = flags.get(name, usual[name])
        if name not in LEFT_OUT and (name == "seed" or _plain(value) != _plain(usual[name])):
            words += _words(action, value)
    return shlex.join(["python", "train.py", *words])


def _words(action: argparse.Action, value: Any) -> list[str]:
    texts = [text for text in action.option_strings if text.startswith("--")]
    if value is None or not texts:
        return [] if value is None else [str(value)]
    flag = texts[0]
    if action.nargs == 0:
        return [flag if value else texts[-1]]
    if isinstance(value, Mapping):
        return [flag, *(f"{key}={item}" for key, item in value.items())]
    if isinstance(action.default, list) and action.nargs is None:
        return [word for item in value for word in (flag, str(item))]
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    return [flag, str(value)]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
