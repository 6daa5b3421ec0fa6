"""The class activation maps that ``inspect --cams`` shows."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from timm_structdrop.analysis import (
    Cams,
    cam_place,
    class_activation_maps,
    compare_spread,
    draw_cams,
)
from timm_structdrop.cli._images import Subject, load_subject
from timm_structdrop.errors import UserError
from timm_structdrop.files import Files
from timm_structdrop.words import table

__all__ = ["add_cam_flags", "inspect_cams"]

OWN_SETTINGS: dict[str, Any] = {
    "model_kwargs": {},
    "structdrop": None,
    "drop_block": None,
    "bn_momentum": None,
    "bn_eps": None,
    "pretrained": False,
}
PRETRAINED = "pretrained"


def add_cam_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inspect`` about class activation maps."""
    add = parser.add_argument_group("Class activation maps").add_argument
    add("--cams", action="store_true", help="maps of each image's class instead of the above")
    add(
        "--compare",
        nargs=2,
        action="append",
        default=[],
        metavar=("MODEL", "CHECKPOINT"),
        help="another model on the same images, with weights as of --checkpoint, or 'pretrained'; "
        "may be repeated",
    )
    add(
        "--cam-layer",
        metavar="NAME",
        help="module whose output is mapped; the deepest stage of 3x3 or more if not given",
    )


def inspect_cams(args: argparse.Namespace, subject: Subject, files: Files) -> None:
    """The maps of all the models: printed and written figures, and one picture."""
    subjects = _by_name([subject, *(_other(args, *other) for other in args.compare)])
    found = {name: _maps(args, other) for name, other in subjects.items()}
    figures: dict[str, Any] = {"models": []}
    for number, (name, cams) in enumerate(found.items()):
        other = subjects[name]
        if other.facts["dataset"] != subject.facts["dataset"] or not torch.equal(
            other.targets, subject.targets
        ):
            raise UserError(
                f"--compare needs models of the same images; {name} has others: name the --dataset"
            )
        figures["models"].append({**other.facts, "name": name, **cams.numbers()})
        files.csv(f"cams{f'-{number}' if number else ''}.csv", cams.rows())
    first = found[next(iter(found))]
    figures["more_spread_than_the_first"] = {
        name: compare_spread(first, cams) for name, cams in found.items() if cams is not first
    }
    print(_table(found, figures["more_spread_than_the_first"]))
    files.json("cams.json", figures)
    shown = subject.images[: args.num_samples]
    names = subject.class_names or [str(label) for label in range(int(first.target.max()) + 1)]
    files.picture("cams.png", draw_cams, shown, found, names)


def _other(args: argparse.Namespace, model: str, checkpoint: str) -> Subject:
    """The subject of ``--compare``: the flags about images are shared, those of a model are not."""
    own = {**OWN_SETTINGS, "model": model, "checkpoint": checkpoint}
    if checkpoint == PRETRAINED:
        own |= {"checkpoint": "", "pretrained": True}
    return load_subject(argparse.Namespace(**{**vars(args), **own}))


def _by_name(subjects: list[Subject]) -> dict[str, Subject]:
    """By the models' names, numbered where two are the same."""
    named: dict[str, Subject] = {}
    for subject in subjects:
        name, n = subject.name, 1
        while name in named:
            n += 1
            name = f"{subject.name} ({n})"
        named[name] = subject
    return named


def _maps(args: argparse.Namespace, subject: Subject) -> Cams:
    size = subject.images.shape[2], subject.images.shape[3]
    place = cam_place(subject.model, size, args.cam_layer)
    return class_activation_maps(
        subject.model, subject.images, subject.targets, place, args.batch_size
    )


def _table(found: dict[str, Cams], differences: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, cams in found.items():
        numbers = cams.numbers()
        row = [name, cams.name, f"{numbers['height']}x{numbers['width']}"]
        row.append(f"{numbers['n_correct']} of {numbers['n_images']}")
        for measure in ("area", "entropy"):
            row.append(_pair(numbers[measure]["mean"], numbers[measure]["std"]))
        compared = differences.get(name, {}).get("area")
        row.append(_pair(*_difference(compared)) if compared else "")
        rows.append(row)
    header = ["model", "layer", "map", "right", "area", "entropy", "area minus first"]
    return (
        f"{table(header, rows)}\n"
        "area: fraction of a map above half its maximum; entropy: of its positive part, 1 if "
        "uniform;\nmean +- standard deviation over images; differences image by image +- standard "
        "error"
    )


def _difference(compared: dict[str, Any]) -> tuple[float | None, float | None]:
    return compared["mean_difference"], compared["standard_error"]


def _pair(mean: float | None, spread: float | None) -> str:
    if mean is None:
        return "none"
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} +- {spread:.3f}"
