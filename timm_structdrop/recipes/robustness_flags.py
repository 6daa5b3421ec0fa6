"""Flags of validate.py that ask for more than accuracy: corruptions, an attack, dropping."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from timm_structdrop.analysis.figure import new_figure
from timm_structdrop.errors import UserError
from timm_structdrop.evaluation import (
    SEVERITIES,
    Attack,
    InferenceDrop,
    check_baseline,
    load_corruptions,
    parse_corruptions,
    parse_severities,
    read_corruption_rows,
)
from timm_structdrop.recipes.parser import at_least

__all__ = ["add_robustness_flags", "attack_settings", "check_robustness_flags"]

STUDIES = ("corruptions", "attack", "drop_at_inference")
# What each study takes beside its own flag; these are None, or False, where they are not given.
OF_STUDY = {
    "corruptions": ("severities", "baseline_results", "plot"),
    "attack": ("eps", "steps", "step_size", "targeted", "random_start"),
}
T = TypeVar("T")


def add_robustness_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the three studies, which take place one at a time."""
    add = parser.add_argument_group("Robustness, one of the three at a time").add_argument
    add(
        "--corruptions",
        type=_parsed_by(parse_corruptions),
        metavar="NAMES",
        help="those of ImageNet-C: all, paper (the seven of DropCluster), or name,name,...",
    )
    add(
        "--severities",
        type=_parsed_by(parse_severities),
        metavar="RANGE",
        help="their severities, as 1-5 or 1,3,5; 1-5 if not given",
    )
    add("--baseline-results", metavar="FILE", help="--results-file of a model to compare with")
    add(
        "--plot",
        metavar="FILE",
        help="PNG of top-1 against severity; beside it, FILE-top5 of top-5",
    )
    add("--attack", choices=("pgd",), help="adversarial attack in the maximum norm")
    add(
        "--eps",
        type=_pixels,
        metavar="E",
        help="its radius, where pixels are in [0, 1]; 5/255 if not given",
    )
    add("--steps", type=at_least(1), metavar="N", help="its gradient steps; 2 if not given")
    add(
        "--step-size",
        type=_pixels,
        metavar="E",
        help="change of a pixel in a step; 1/255 if not given",
    )
    add("--targeted", action="store_true", help="towards a random wrong class of each image")
    add("--random-start", action="store_true", help="from a random point within the radius")
    add(
        "--drop-at-inference",
        action="append",
        default=[],
        type=_parsed_by(InferenceDrop.parse),
        metavar="block=SIZE,keep=P",
        help="switch DropBlock on (and into the model, if it has none); with ,gamma=paper at the "
        "paper's seed rate, by which large blocks drop less than 1 - P; may be repeated",
    )


def _parsed_by(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A type of flag from a function that raises UserError."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    convert.__name__ = "text"
    return convert


def _pixels(text: str) -> float:
    """A change of a pixel: a decimal number or a fraction like 5/255."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(
            f"must be a number or a fraction like 5/255; got {text!r}"
        ) from error


def check_robustness_flags(flags: argparse.Namespace) -> None:
    """What would otherwise fail after the work is done, or be passed over in silence.

    Raises:
        UserError: two studies at a time, a flag without its study, a library that is missing, a
            baseline that is no results file, or settings that are out of range.
    """
    asked = [f"--{name.replace('_', '-')}" for name in STUDIES if getattr(flags, name)]
    if len(asked) > 1:
        raise UserError(f"studies of robustness run one at a time; got {' and '.join(asked)}")
    for study, names in OF_STUDY.items():
        given = [name for name in names if getattr(flags, name) not in (None, False)]
        if given and not getattr(flags, study):
            raise UserError(f"--{given[0].replace('_', '-')} needs --{study}; it is not given")
    if flags.corruptions:
        load_corruptions()
        if flags.baseline_results:
            severities = flags.severities or SEVERITIES
            wanted = [(name, s) for name in flags.corruptions for s in severities]
            check_baseline(read_corruption_rows(flags.baseline_results), wanted)
        if flags.plot:
            _check_picture(Path(flags.plot))
    if flags.attack:
        attack_settings(flags)
        if "float16" in (flags.model_dtype, flags.amp_dtype if flags.amp else None):
            raise UserError(
                "--attack needs gradients that do not vanish: bfloat16 or float32; got float16"
            )


def _check_picture(path: Path) -> None:
    new_figure(1, 1)  # says what to install if matplotlib is missing
    if path.suffix.lower() != ".png" or path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--plot must be a .png file in an existing folder; got {path}")


def attack_settings(flags: argparse.Namespace) -> Attack:
    """The attack that the flags describe.

    Raises:
        UserError: a setting is out of range.
    """
    values: dict[str, Any] = {field.name: getattr(flags, field.name) for field in fields(Attack)}
    return Attack(**{name: value for name, value in values.items() if value is not None})
