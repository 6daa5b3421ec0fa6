"""Augmentations at the image's own size, before timm's transforms resize it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from torchvision.transforms import Compose, InterpolationMode, RandomCrop, RandomRotation

from timm_structdrop.data.wrapper import DatasetWrapper
from timm_structdrop.errors import UserError

PilTransform = Callable[[Image.Image], Image.Image]


class OwnSizeCrop:
    """torchvision's `RandomCrop` of an image, padded by `padding` pixels, back to its own size.

    `padding_mode` is torchvision's: `"constant"` pads with zeros, `"edge"` repeats the border.
    """

    def __init__(self, padding: int, padding_mode: str = "constant") -> None:
        self.padding = padding
        self.padding_mode = padding_mode

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        crop = RandomCrop((height, width), self.padding, padding_mode=self.padding_mode)
        return crop(image)

    def __repr__(self) -> str:
        return f"OwnSizeCrop(padding={self.padding}, padding_mode={self.padding_mode!r})"


class ToMode:
    """Convert an image to a PIL mode: torchvision's datasets know no `input_img_mode`."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.convert(self.mode)


def own_size_transforms(
    crop_padding: int = 0, rotation: float = 0.0, shift: int = 0
) -> list[PilTransform]:
    """Random rotation by up to `rotation` degrees (bilinear, zeros outside), shift by up to `shift`
    pixels (the border repeated), crop with `crop_padding` pixels of zero padding; in this order.

    Raises `UserError` when one of them is negative or `rotation` exceeds 180.
    """
    for name, value in (("crop_padding", crop_padding), ("shift", shift)):
        if value < 0:
            raise UserError(f"{name} must be at least 0 pixels; got {value}")
    if not 0 <= rotation <= 180:
        raise UserError(f"rotation must be in [0, 180] degrees; got {rotation}")
    steps: list[PilTransform] = []
    if rotation:
        steps.append(RandomRotation(rotation, interpolation=InterpolationMode.BILINEAR))
    if shift:
        steps.append(OwnSizeCrop(shift, "edge"))
    if crop_padding:
        steps.append(OwnSizeCrop(crop_padding))
    return steps


class TransformedFirst(DatasetWrapper):
    """A map-style dataset whose images pass through `first` before its own `transform`."""

    def __init__(self, dataset: Any, first: list[PilTransform]) -> None:
        super().__init__(dataset)
        self.first = first
        self.transform = dataset.transform

    @property
    def transform(self) -> Callable[[Image.Image], Any] | None:
        """What runs after `first`; timm's `create_loader` assigns it."""
        return self._transform

    @transform.setter
    def transform(self, transform: Callable[[Image.Image], Any] | None) -> None:
        self._transform = transform
        self.dataset.transform = Compose([*self.first, *([transform] if transform else [])])

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.dataset[index]
