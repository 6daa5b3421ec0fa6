"""Class activation maps in numbers: where the evidence for a class lies, and how spread it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timm_structdrop.analysis.maps import Place, find_places, place_named, watch_maps
from timm_structdrop.errors import UserError
from timm_structdrop.layers.camdrop import guidance
from timm_structdrop.models.trace import first_conv
from timm_structdrop.training.steps import classifier_weight, target_weights

__all__ = ["Cams", "cam_place", "class_activation_maps", "compare_spread"]

LEAST_SIDE = 3  # pixels; smaller maps say nothing about where


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

    handle = model.register_forward_hook(lambda _, args, output: logits.append(output.cpu()))
    try:
        watch_maps(model, [place], images, see, batch_size)
    finally:
        handle.remove()
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
