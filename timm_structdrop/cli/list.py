"""Print the registered variants, the regularized layers of one model, or the recipes."""

from __future__ import annotations

import argparse
from fnmatch import fnmatch
from functools import cache

import timm
import torch
from torch import nn

from timm_structdrop.errors import UserError, nearest
from timm_structdrop.layers import StructDropLayer, regularizers
from timm_structdrop.models.architectures import architectures
from timm_structdrop.models.slots import Slot, find_slots
from timm_structdrop.models.structdrop_variants import variants
from timm_structdrop.recipes import (
    Cell,
    Table,
    load_recipe,
    load_table,
    recipe_names,
    table_names,
)
from timm_structdrop.words import table

__all__ = ["add_flags", "run"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m timm_structdrop list``."""
    parser.add_argument(
        "filter",
        nargs="?",
        default="*",
        metavar="PATTERN",
        help="only names that match, as in timm.list_models: '*_dropcluster'",
    )
    add = parser.add_mutually_exclusive_group().add_argument
    add("--layers", metavar="MODEL", help="print the regularized layers of this model instead")
    add("--recipes", action="store_true", help="print recipes and the papers' tables instead")


def run(args: argparse.Namespace) -> None:
    """Print the registered variants, the packaged recipes or the layers of a model."""
    if args.layers:
        print(layers_table(args.layers))
    elif args.recipes:
        print(recipes_table(args.filter))
    else:
        print(variants_table(args.filter))


def variants_table(pattern: str) -> str:
    """One line per variant whose name matches the wildcard; of a single one, all pretrained tags.

    Raises:
        UserError: no name matches.
    """
    chosen = [v for name, v in variants.items() if fnmatch(name, pattern)]
    if not chosen:
        raise UserError(
            f"the filter must match a variant's name; got {pattern!r}{nearest(pattern, variants)}"
        )
    rows = []
    for variant in chosen:
        layer = regularizers[variant.regularizer].layer
        tags = [cfg.tag for _, cfg in variant.cfgs() if cfg.has_weights and cfg.tag]
        rows.append(
            [
                variant.name,
                variant.where(*_places(variant.architecture.name)),
                f"{_parameters(variant.architecture.name) / 1e6:.2f}M",
                f"{layer.default_drop_prob():g}",
                " ".join(tags if len(chosen) == 1 else _first(tags)) or "-",
            ]
        )
    return table(["variant", "where", "params", "rate", "pretrained"], rows)


def _first(tags: list[str]) -> list[str]:
    return tags if len(tags) <= 2 else [tags[0], f"and {len(tags) - 1} more"]


def recipes_table(pattern: str) -> str:
    """The single recipes, then one line per cell of the papers' tables, as far as names match.

    Raises:
        UserError: no name matches.
    """
    names = recipe_names()
    chosen = {name for name in names if fnmatch(name, pattern)}
    if not chosen:
        raise UserError(
            f"the filter must match a recipe's name; got {pattern!r}{nearest(pattern, names)}"
        )
    single = sorted(name for name in chosen if "/" not in name)
    rows = [[name, str(load_recipe(name).get("description", ""))] for name in single]
    parts = [table(["recipe", "what it does"], rows)] if rows else []
    rows = [
        _cell_row(whole, cell)
        for whole in map(load_table, table_names())
        for cell in whole.cells.values()
        if cell.name in chosen
    ]
    header = ["recipe", "paper", "table", "model", "data", "published", "metric"]
    return "\n\n".join([*parts, *([table(header, rows)] if rows else [])])


def _cell_row(whole: Table, cell: Cell) -> list[str]:
    figures = [f"{name} {value:.2f}" for name, value in cell.published.items()]
    more = [f"{len(figures) - 2} more"] if len(figures) > 2 else []
    published = ", ".join(figures[:2] + more)
    return [
        cell.name,
        whole.paper.split(",")[0] or "-",
        whole.table or "-",
        cell.flags.get("model", "-"),
        cell.flags.get("dataset", "-"),
        published or "-",
        whole.metric.text,
    ]


def layers_table(model_name: str) -> str:
    """One line per regularized layer of a timm model: its name, its rate and its settings.

    Raises:
        UserError: timm does not know the model, or it has no such layer.
    """
    if not timm.is_model(model_name):
        raise UserError(
            f"MODEL must be a model timm knows; "
            f"got {model_name!r}{nearest(model_name, timm.list_models())}"
        )
    model = timm.create_model(model_name)
    rows = []
    for path, module in model.named_modules():
        if isinstance(module, StructDropLayer):
            rows.append([path, module.regularizer, f"{module.rate():g}", module.extra_repr()])
    if not rows:
        raise UserError(f"MODEL must have a structured-dropout layer; {model_name!r} has none")
    return table(["layer", "regularizer", "rate", "settings"], rows)


@cache
def _plain(architecture: str) -> nn.Module:
    """Without memory for its weights."""
    with torch.device("meta"):
        return architectures[architecture].constructor()


@cache
def _places(architecture: str) -> tuple[nn.Module, list[Slot]]:
    model = _plain(architecture)
    height, width = architectures[architecture].cfg["input_size"][-2:]
    return model, find_slots(model, (height, width))


def _parameters(architecture: str) -> int:
    return sum(parameter.numel() for parameter in _plain(architecture).parameters())
