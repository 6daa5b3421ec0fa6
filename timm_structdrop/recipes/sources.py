"""Values of flags from packaged recipes, YAML files and the command line, each checked alike."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_structdrop.errors import UserError
from timm_structdrop.recipes.packaged import (
    FACTS,
    check_keys,
    load_recipe,
    read_mapping,
    recipe_names,
)
from timm_structdrop.recipes.parser import FlagParser, check_choice
from timm_structdrop.recipes.train_flags import train_parser

__all__ = ["load_recipe", "parse_with_sources", "recipe_names"]

NOT_CONTINUED = ("recipe", "config", "resume", "output", "experiment")


def parse_with_sources(parser: FlagParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse ``argv`` over the values of ``--config`` over those of ``--recipe``.

    A run that is continued (``--resume``) starts from the ``args.yaml`` beside its checkpoint,
    below the recipe; what it says of flags that are not here (timm's train.py has more) is left
    out. A YAML key is a flag's name with underscores. One that only train.py knows is skipped by
    other commands, so that they take the same files.

    Raises:
        UserError: an unknown flag, key or recipe, or a value that its flag does not accept.
    """
    sources = FlagParser(add_help=False)
    for flags in (("--recipe",), ("-c", "--config"), ("--resume",)):
        sources.add_argument(*flags)
    named, _ = sources.parse_known_args(argv)
    own = parser.flags()
    if named.resume and "resume" in own:
        saved = {key: value for key, value in _saved_flags(named.resume).items() if key in own}
        _set_defaults(parser, saved, f"args.yaml of {named.resume}")
    config = _read_config(named.config) if named.config else {}
    recipe = named.recipe or config.get("recipe")
    if recipe:
        values = {key: value for key, value in load_recipe(recipe).items() if key not in FACTS}
        _set_defaults(parser, values, f"recipe {recipe}")
    _set_defaults(parser, config, f"config {named.config}")
    return parser.parse_flags(argv)


def _read_config(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UserError(f"config must be an existing YAML file; got {path}")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"config must be a text file; got {path}") from error
    values = read_mapping(text, f"config {path}")
    # the args.yaml of a run names the config it was started with, which is merged into it
    return {key: value for key, value in values.items() if key not in ("config", *FACTS)}


def _saved_flags(resume: str) -> dict[str, Any]:
    folder = Path(resume) if Path(resume).is_dir() else Path(resume).parent
    saved = folder / "args.yaml"
    if not saved.is_file():
        return {}
    values = _read_config(str(saved))
    return {key: value for key, value in values.items() if key not in NOT_CONTINUED}


def _set_defaults(parser: FlagParser, values: Mapping[str, Any], source: str) -> None:
    own = parser.flags()
    check_keys(values, source, {*own, *train_parser().flags()})
    defaults = {
        key: _converted(own[key], value, f"{key} in {source}")
        for key, value in values.items()
        if key in own
    }
    parser.set_defaults(**defaults)


def _converted(action: argparse.Action, value: Any, where: str) -> Any:
    """A YAML value as the flag's own parsing would have made it of text."""
    if value is None or value == action.default:
        return value
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{where} must be true or false; got {value!r}")
        return value
    if isinstance(action.default, dict):
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a mapping; got {value!r}")
        return value
    if action.nargs in ("+", "*") or isinstance(action.nargs, int) or action.default == []:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} must be a list; got {value!r}")
        if isinstance(action.nargs, int) and len(value) != action.nargs:
            raise UserError(f"{where} must be a list of {action.nargs}; got {value!r}")
        return [_one(action, item, where) for item in value]
    return _one(action, value, where)


def _one(action: argparse.Action, value: Any, where: str) -> Any:
    convert: Any = action.type or str
    if isinstance(value, (bool, dict, list)):
        raise UserError(f"{where} must be one {convert.__name__}; got {value!r}")
    try:
        converted = convert(str(value))
        check_choice(action, converted)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{where} {error}") from error
    except ValueError as error:
        raise UserError(f"{where} must be of type {convert.__name__}; got {value!r}") from error
    return converted
