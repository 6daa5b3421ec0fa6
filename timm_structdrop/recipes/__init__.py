"""Recipes: packaged settings of train.py, and the flags they are written in."""

from timm_structdrop.recipes.flags import (
    add_data_flags,
    add_device_flags,
    add_model_flags,
    add_source_flags,
)
from timm_structdrop.recipes.metric import Metric, parse_metric
from timm_structdrop.recipes.packaged import (
    Cell,
    Table,
    load_recipe,
    load_table,
    recipe_names,
    table_names,
)
from timm_structdrop.recipes.parser import FlagParser, parse_structdrop
from timm_structdrop.recipes.sources import parse_with_sources
from timm_structdrop.recipes.train_flags import train_parser

__all__ = [
    "Cell",
    "FlagParser",
    "Metric",
    "Table",
    "add_data_flags",
    "add_device_flags",
    "add_model_flags",
    "add_source_flags",
    "load_recipe",
    "load_table",
    "parse_metric",
    "parse_structdrop",
    "parse_with_sources",
    "recipe_names",
    "table_names",
    "train_parser",
]
