"""The packaged recipes: single ones, and tables of papers whose cells are recipes."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml

from timm_structdrop.errors import UserError, nearest
from timm_structdrop.recipes.metric import Metric, is_of_a_run, parse_metric
from timm_structdrop.recipes.train_flags import train_parser

__all__ = [
    "FACTS",
    "Cell",
    "Table",
    "check_keys",
    "load_recipe",
    "load_table",
    "read_mapping",
    "recipe_names",
    "table_names",
]

# what a recipe says beside flags of train.py
FACTS = (
    "description",
    "paper",
    "table",
    "row",
    "metric",
    "published",
    "published_std",
    "runs",
    "note",
)
TABLE_FACTS = ("paper", "table", "about", "metric", "runs", "note")
CELL_FACTS = ("row", "published", "published_std", "note")


@dataclass(frozen=True)
class Cell:
    """One row, or one row and column, of a table: a recipe under the name ``table/cell``.

    Attributes:
        name: the recipe's name.
        row: what the paper calls it.
        flags: of train.py.
        published: the paper's figures, in percent; by what `Metric.of` takes or, where they do not
            come from the epochs of a run, by the name of what was measured.
        published_std: their standard deviations, where the paper has them.
        note: where this is the nearest one can get to the paper's setting.
    """

    name: str
    row: str
    flags: dict[str, Any]
    published: dict[str, float] = field(default_factory=dict)
    published_std: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table or a figure of a paper.

    Attributes:
        name: of the file.
        paper: authors, year and where it is; empty for tables of no paper.
        table: its number in the paper.
        about: what it compares.
        metric: how the paper makes one figure of a run.
        runs: over how many runs the paper averages; None where it does not say.
        note: what the paper leaves open and what is chosen here.
        cells: by the last part of their names.
    """

    name: str
    paper: str
    table: str
    about: str
    metric: Metric
    runs: int | None
    note: str
    cells: dict[str, Cell]

    def figures(self) -> list[str]:
        """What its runs are measured by, the first one first: ``top1`` and ``top5`` where the paper
        has no figures of a run."""
        named = [name for cell in self.cells.values() for name in cell.published]
        return [name for name in dict.fromkeys(named) if is_of_a_run(name)] or ["top1", "top5"]


def table_names() -> list[str]:
    """The packaged tables, sorted."""
    return _names("tables")


def recipe_names() -> list[str]:
    """The packaged recipes, sorted: the single ones, then the cells of the tables."""
    cells = [cell.name for name in table_names() for cell in load_table(name).cells.values()]
    return [*_names(""), *cells]


@cache
def load_table(name: str) -> Table:
    """A packaged table.

    Raises:
        UserError: there is no such table, or its file is not of the form.
    """
    if name not in table_names():
        raise UserError(f"unknown table {name!r}{nearest(name, table_names())}")
    return read_table(name, _text(f"tables/{name}.yaml"))


def read_table(name: str, text: str) -> Table:
    """A table from YAML: facts, ``base`` (flags of every cell) and ``cells`` (facts and flags; a
    mapping, such as ``model_kwargs``, is merged with that of the base).

    Raises:
        UserError: it is not of this form.
    """
    source = f"table {name}"
    values = read_mapping(text, source)
    check_keys(values, source, {*TABLE_FACTS, "base", "cells"})
    base, cells = values.get("base", {}), values.get("cells")
    if not isinstance(base, dict) or not isinstance(cells, dict) or not cells:
        raise UserError(f"{source} must have cells, and a base that is a mapping of flags")
    flags = _flag_names()
    check_keys(base, f"the base of {source}", flags)
    read = {}
    for key, content in cells.items():
        where = f"{name}/{key}"
        if not isinstance(content, dict):
            raise UserError(f"{where} must be a mapping of facts and flags; got {content!r}")
        check_keys(content, where, {*flags, *CELL_FACTS})
        own = {name: value for name, value in content.items() if name not in CELL_FACTS}
        read[str(key)] = Cell(
            name=where,
            row=str(content.get("row", key)),
            flags=_merged(base, own),
            published=_figures(content, "published", where),
            published_std=_figures(content, "published_std", where),
            note=content.get("note", ""),
        )
    return Table(
        name=name,
        paper=values.get("paper", ""),
        table=values.get("table", ""),
        about=values.get("about", ""),
        metric=parse_metric(values.get("metric", "last")),
        runs=values.get("runs"),
        note=values.get("note", ""),
        cells=read,
    )


def load_recipe(name: str) -> dict[str, Any]:
    """A packaged recipe: flags of train.py and facts (`FACTS`); ``table/cell`` for one of a table.

    Raises:
        UserError: there is no such recipe, or it has a key that is no flag.
    """
    if not isinstance(name, str):
        raise UserError(f"a recipe must be named by text; got {name!r}")
    table, slash, key = name.partition("/")
    if slash and table in table_names():
        cells = load_table(table).cells
        if key not in cells:
            raise UserError(f"unknown recipe {name!r} of table {table}{nearest(key, cells)}")
        return _cell_recipe(load_table(table), cells[key])
    if name in table_names():
        cells = load_table(name).cells
        raise UserError(
            f"{name} is a table: a recipe is one of its cells, such as {name}/{next(iter(cells))}; "
            "python -m timm_structdrop sweep runs them all"
        )
    if name not in _names(""):
        raise UserError(f"unknown recipe {name!r}{nearest(name, recipe_names())}")
    recipe = read_mapping(_text(f"{name}.yaml"), f"recipe {name}")
    check_keys(recipe, f"recipe {name}", {*_flag_names(), *FACTS})
    return recipe


def _cell_recipe(table: Table, cell: Cell) -> dict[str, Any]:
    facts = {
        "description": f"{table.about}: {cell.row}",
        "paper": table.paper,
        "table": table.table,
        "row": cell.row,
        "metric": table.metric.text,
        "published": cell.published,
        "published_std": cell.published_std,
        "runs": table.runs,
        # without its last full stop, as those of single recipes: who quotes it sets one
        "note": " ".join(filter(None, (table.note, cell.note))).removesuffix("."),
    }
    return {**{key: value for key, value in facts.items() if value}, **cell.flags}


def read_mapping(text: str, source: str) -> dict[str, Any]:
    """YAML that is a mapping, or nothing.

    Raises:
        UserError: it is something else; ``source`` names it.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source} must be valid YAML; {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{source} must be a mapping of flags to values; got {type(values)}")
    return values


def check_keys(values: Mapping[str, Any], source: str, valid: Set[str]) -> None:
    """Raise UserError for a key that is not one of ``valid``."""
    for key in values:
        if key not in valid:
            raise UserError(f"unknown key {key!r} in {source}{nearest(str(key), valid)}")


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    flags = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(flags.get(key), dict)
        flags[key] = {**flags[key], **value} if both else value
    return flags


def _figures(content: Mapping[str, Any], key: str, where: str) -> dict[str, float]:
    figures = content.get(key, {})
    try:
        return {str(name): float(value) for name, value in figures.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{key} of {where} must map figures to numbers; got {figures!r}") from error


@cache
def _flag_names() -> frozenset[str]:
    return frozenset(train_parser().flags())


def _names(folder: str) -> list[str]:
    place = resources.files(__package__)
    files = (place.joinpath(folder) if folder else place).iterdir()
    return sorted(file.name[:-5] for file in files if file.name.endswith(".yaml"))


def _text(path: str) -> str:
    return resources.files(__package__).joinpath(path).read_text(encoding="utf-8")
