"""Class activation maps: where the evidence for a class lies and how spread it is, in numbers and
in pictures of the same images seen by several models."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_structdrop.analysis.figure import colour_bar, new_figure, picture
from timm_structdrop.analysis.maps import Place, find_places, place_named, watch_maps
from timm_structdrop.errors import UserError
from timm_structdrop.layers.camdrop import guidance
from timm_structdrop.models.trace import first_conv
from timm_structdrop.training.steps import classifier_weight, target_weights

__all__ = ["Cams", "cam_place", "class_activation_maps", "compare_spread", "draw_cams"]

LEAST_SIDE = 3  # pixels; smaller maps say nothing about where
CELL, GAP, TEXT, LABEL = 1.3, 0.1, 0.24, 1.75  # inches
HALF, RIGHT, WRONG = "white", "black", "#b2182b"
OPACITY = 0.6
LONGEST = 20  # characters of a line left of a row


@dataclass(frozen=True, eq=False)
class Cams:
    """The class activation maps of images at one place of a model.

    Attributes:
        name: the place.
        maps: J of each image, (N, H, W) float32, unscaled.
        target: the class that each map is of, (N,) int64.
        predicted: the class that the model says, (N,) int64.
    """

    name: str
    maps: Tensor
    target: Tensor
    predicted: Tensor

    def area(self) -> Tensor:
        """The fraction of each map that is at least half its maximum, (N,) in (0, 1]; NaN where
        the map is nowhere positive. What is spread over more of the image has more."""
        peak = self.maps.amax((1, 2))
        above = (self.maps >= peak[:, None, None] / 2).double().mean((1, 2))
        return torch.where(peak > 0, above, math.nan)

    def entropy(self) -> Tensor:
        """Entropy of each map's positive part, as a distribution over its pixels, divided by that
        of the uniform one, log(H W): (N,) in [0, 1]; NaN where the map is nowhere positive."""
        parts = self.maps.double().clamp(min=0).flatten(1)
        parts = parts / parts.sum(1, keepdim=True)
        return torch.special.entr(parts).sum(1) / math.log(parts.shape[1])

    def correct(self) -> Tensor:
        """Whether the model predicts the target, (N,) bool."""
        return self.predicted == self.target

    def numbers(self) -> dict[str, Any]:
        """The figures over the images, JSON-able: means with standard deviations."""
        area, entropy = self.area(), self.entropy()
        known = ~area.isnan()
        return {
            "layer": self.name,
            "height": self.maps.shape[1],
            "width": self.maps.shape[2],
            "n_images": len(self.maps),
            "n_correct": int(self.correct().sum()),
            "n_with_positive_map": int(known.sum()),
            "area": _mean_and_std(area[known]),
            "entropy": _mean_and_std(entropy[known]),
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per image; the measures of a map that is nowhere positive are empty."""
        figures = zip(
            self.target.tolist(),
            self.predicted.tolist(),
            self.maps.amax((1, 2)).tolist(),
            self.area().tolist(),
            self.entropy().tolist(),
            strict=True,
        )
        for image, (target, predicted, peak, area, entropy) in enumerate(figures):
            nowhere = math.isnan(area)
            yield {
                "layer": self.name,
                "image": image,
                "target": target,
                "predicted": predicted,
                "maximum": peak,
                "area": "" if nowhere else area,
                "entropy": "" if nowhere else entropy,
            }


def cam_place(model: nn.Module, img_size: tuple[int, int], layer: str | None = None) -> Place:
    """Where maps are taken: the module ``layer``, or the end of the deepest stage whose maps have
    at least 3x3 pixels.

    Args:
        model: a timm CNN; any CNN if ``layer`` is named.
        img_size: (H, W) of its images.
        layer: name of a module.

    Raises:
        UserError: there is no such module, or no stage of that size.
    """
    if layer is not None:
        return place_named(model, layer)
    sizes: dict[str, tuple[int, int]] = {}
    places = find_places(model, img_size)
    watch_maps(
        model,
        places,
        torch.zeros(1, first_conv(model).in_channels, *img_size),
        lambda place, shown: sizes.update({place.name: (shown.shape[2], shown.shape[3])}),
    )
    found = [place for place in places if min(sizes.get(place.name, (0,))) >= LEAST_SIDE]
    if not found:
        raise UserError(
            f"class activation maps need a stage with maps of at least {LEAST_SIDE}x{LEAST_SIDE}; "
            f"those of {type(model).__name__} are smaller at {img_size[0]}x{img_size[1]}"
        )
    return found[-1]


@torch.no_grad()
def class_activation_maps(
    model: nn.Module, images: Tensor, target: Tensor, place: Place, batch_size: int = 64
) -> Cams:
    """J = sum_c alpha_c X_c, Eqs. (5) and (7) of CamDrop, of the target class in eval mode.

    X are the activations at the place and alpha the classifier's weights of the class, compressed
    to as many channels. At the last map, which the classifier averages, J says how much each pixel
    adds to the class's score (up to its bias); at earlier places it is what CamDrop ranks by there.

    Args:
        model: a CNN with a linear classifier; as before afterwards.
        images: (N, C, H, W), as the model takes them.
        target: class of each image, (N,) int64.
        place: of this model.
        batch_size: images per forward pass.

    Raises:
        UserError: the model has no linear classifier, or ``target`` does not fit it or the images.
    """
    weight = classifier_weight(model)
    alpha = target_weights(weight.cpu(), target, len(images))
    maps: list[Tensor] = []
    logits: list[Tensor] = []

    def see(_: Place, shown: Tensor) -> None:
        first = sum(len(part) for part in maps)
        rows = alpha[first : first + len(shown)].to(shown.device)
        maps.append(guidance(shown, rows, "cam")[1].cpu())

    with model.register_forward_hook(lambda _, args, output: logits.append(output.cpu())):
        watch_maps(model, [place], images, see, batch_size)
    return Cams(place.name, torch.cat(maps), target.cpu(), torch.cat(logits).argmax(1))


def compare_spread(first: Cams, second: Cams) -> dict[str, Any]:
    """How much more spread the maps of ``second`` are than those of ``first``, image by image.

    Args:
        first: of some images.
        second: of the same images and classes, from another model.

    Returns:
        For ``area`` and ``entropy`` the mean of the differences, their standard error over the
        images with a positive map in both, the number of these, and the share of images in which
        the second is more spread; None in place of what cannot be said of so few.

    Raises:
        UserError: the images are not of the same classes.
    """
    if not torch.equal(first.target, second.target):
        raise UserError("maps are compared image by image; got images of different classes")
    found: dict[str, Any] = {}
    for name in ("area", "entropy"):
        differences = getattr(second, name)() - getattr(first, name)()
        differences = differences[~differences.isnan()]
        n = len(differences)
        found[name] = {
            "n": n,
            "mean_difference": float(differences.mean()) if n else None,
            "standard_error": float(differences.std()) / math.sqrt(n) if n > 1 else None,
            "share_more_spread": float((differences > 0).double().mean()) if n else None,
        }
    return found


def _mean_and_std(values: Tensor) -> dict[str, float | None]:
    return {
        "mean": float(values.mean()) if len(values) else None,
        "std": float(values.std()) if len(values) > 1 else None,
    }


def draw_cams(images: Tensor, models: Mapping[str, Cams], class_names: Sequence[str]) -> Any:
    """Fig. 3 of CamDrop and Fig. 6 of DropBlock: the maps of the first images, a row per model.

    Each map is scaled to its own maximum, below which zero and less look the same; the white line
    is half of the maximum. Beneath it stands the fraction of the image within that line, and in red
    what the model says where that is not the target.

    Args:
        images: the S images to draw, (S, C, H, W).
        models: each model's maps by its name, of at least S images, these first.
        class_names: by class.

    Returns:
        A matplotlib figure.
    """
    shown = len(images)
    header, footer = 0.7, 0.5
    width = max(LABEL + shown * (CELL + GAP) + 0.15, 6.2)
    row_height = CELL + TEXT + GAP
    height = header + footer + (1 + len(models)) * row_height
    figure = new_figure(width, height)

    def cell(row: int, column: int) -> Any:
        left = LABEL + column * (CELL + GAP)
        top = header + row * row_height
        axis = figure.add_axes(
            (left / width, 1 - (top + CELL) / height, CELL / width, CELL / height)
        )
        axis.set_axis_off()
        return axis

    def label(row: int, text: str) -> None:
        y = 1 - (header + row * row_height + CELL / 2) / height
        figure.text((LABEL - 0.1) / width, y, text, ha="right", va="center", fontsize=8.5)

    label(0, "image")
    for column in range(shown):
        target = int(next(iter(models.values())).target[column])
        axis = cell(0, column)
        axis.imshow(picture(images[column]))
        _write(axis, class_names[target], RIGHT)
    for row, (name, cams) in enumerate(models.items(), start=1):
        label(row, _summary(name, cams))
        areas = cams.area()[:shown].tolist()
        for column, predicted in enumerate(cams.predicted[:shown].tolist()):
            axis = cell(row, column)
            _draw_map(axis, images[column], cams.maps[column])
            wrong = predicted != int(cams.target[column])
            text = f"{areas[column]:.2f}" + (f", says {class_names[predicted]}" if wrong else "")
            _write(axis, text, WRONG if wrong else RIGHT)
    layers = ", ".join(dict.fromkeys(cams.name for cams in models.values()))
    figure.suptitle(
        f"Class activation maps of the target class at {layers}",
        fontsize=11,
        y=1 - 0.12 / height,
        va="top",
    )
    what = "white line: half of the map's maximum; number: the fraction of the image within it"
    figure.text(0.5, 1 - 0.38 / height, what, fontsize=8, ha="center", va="top")
    bar = figure.add_axes((LABEL / width, 0.3 / height, 1.5 / width, 0.1 / height))
    colour_bar(figure, bar, "inferno", {0.0: "0 or less", 0.5: "half", 1.0: "map's maximum"})
    return figure


def _summary(name: str, cams: Cams) -> str:
    numbers = cams.numbers()
    mean = numbers["area"]["mean"]
    area = "no positive map" if mean is None else f"mean area {mean:.3f}"
    lines = (line.replace("_ ", "_") for line in textwrap.wrap(name.replace("_", "_ "), LONGEST))
    return f"{chr(10).join(lines)}\n{area}\n{numbers['n_correct']} of {numbers['n_images']} right"


def _draw_map(axis: Any, image: Tensor, cam: Tensor) -> None:
    size = (image.shape[1], image.shape[2])
    grown = F.interpolate(cam[None, None].clamp(min=0), size, mode="bilinear")[0, 0].numpy()
    axis.imshow(picture(image).mean(2), cmap="gray", vmin=0, vmax=1)
    peak = grown.max()
    scaled = grown / peak if peak > 0 else grown
    axis.imshow(scaled, cmap="inferno", vmin=0, vmax=1, alpha=OPACITY)
    if peak > scaled.min() and scaled.min() < 0.5 < scaled.max():
        axis.contour(scaled, levels=[0.5], colors=HALF, linewidths=1.2)


def _write(axis: Any, text: str, colour: str) -> None:
    axis.text(
        0.5, -0.03, text, transform=axis.transAxes, fontsize=8, color=colour, ha="center", va="top"
    )
