"""Recipes: packaged settings of train.py, and the flags they are written in."""

from timm_structdrop.recipes.flags import (
    add_data_flags,
    add_device_flags,
    add_model_flags,
    add_source_flags,
)
from timm_structdrop.recipes.parser import FlagParser, parse_structdrop
from timm_structdrop.recipes.sources import load_recipe, parse_with_sources, recipe_names
from timm_structdrop.recipes.train_flags import train_parser

__all__ = [
    "FlagParser",
    "add_data_flags",
    "add_device_flags",
    "add_model_flags",
    "add_source_flags",
    "load_recipe",
    "parse_structdrop",
    "parse_with_sources",
    "recipe_names",
    "train_parser",
]
