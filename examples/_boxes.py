"""Images with boxes: objects pasted into photographs, or COCO's."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import Dataset

from timm_structdrop.errors import UserError

CLASSES = ("disc", "square", "triangle")
COLOURS = ((200, 60, 60), (60, 60, 200), (60, 200, 60))  # of each class, about
Sample = tuple[Tensor, dict[str, Tensor]]

# The left part of each photograph is trained on, the right part evaluated on.
TRAIN_COLUMNS, VALIDATION_COLUMNS = slice(0, 384), slice(400, 640)


class PastedObjects(Dataset):
    """Reddish discs, bluish squares and greenish triangles, textured, on parts of real photographs.

    The photographs are scikit-learn's two sample images. Sample i is a pure function of (seed, i):
    an image (3, S, S) in [0, 1] with one to three objects, and its target: ``boxes`` (N, 4) as x1,
    y1, x2, y2 in pixels and ``labels`` (N,), indices of ``CLASSES``. Training and validation take
    different parts of the photographs.
    """

    classes = CLASSES

    def __init__(self, size: int, length: int, is_train: bool, seed: int = 0) -> None:
        if size < 48:
            raise UserError(f"the image size must be at least 48, to hold an object; got {size}")
        columns = TRAIN_COLUMNS if is_train else VALIDATION_COLUMNS
        self.photos = [photo[:, columns] for photo in load_sample_images().images]
        self.size, self.length = size, length
        self.seed, self.part = seed, 0 if is_train else 1

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        draw = np.random.default_rng((self.seed, self.part, index))
        image = self._crop(draw, self.size)
        boxes: list[tuple[int, int, int, int]] = []
        labels = []
        for _ in range(draw.integers(1, 4)):
            label = int(draw.integers(len(CLASSES)))
            side = int(draw.integers(self.size // 4, self.size // 2))
            x, y = (int(v) for v in draw.integers(0, self.size - side, 2))
            box = (x, y, x + side, y + side)
            if any(_touch(box, other) for other in boxes):
                continue
            mask, pattern = _shape(CLASSES[label], side, draw)
            colour = COLOURS[label] + draw.uniform(-55, 55, 3)
            other = draw.uniform(0, 255, 3)
            texture = self._crop(draw, side)[..., draw.permutation(3)]
            inside = 0.3 * texture + 0.7 * (colour * pattern + other * (1 - pattern))
            part = image[y : y + side, x : x + side]
            part[mask] = inside[mask]
            boxes.append(box)
            labels.append(label)
        target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }
        return torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1), target

    def _crop(self, draw: np.random.Generator, size: int) -> NDArray[np.uint8]:
        """A random square of a photograph, resized to (size, size, 3)."""
        photo = self.photos[draw.integers(len(self.photos))]
        side = int(draw.integers(90, min(photo.shape[:2]) + 1))
        y, x = (int(draw.integers(0, length - side + 1)) for length in photo.shape[:2])
        crop = Image.fromarray(photo[y : y + side, x : x + side])
        return np.array(crop.resize((size, size), Image.Resampling.BILINEAR))


def _touch(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _shape(
    name: str, side: int, draw: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.floating]]:
    """Where the object is, (side, side), and its two-coloured pattern, (side, side, 1)."""
    y, x = np.mgrid[0:side, 0:side] / (side - 1)
    waves = draw.uniform(3, 5)
    if name == "disc":
        radius = np.hypot(y - 0.5, x - 0.5)
        mask, pattern = radius <= 0.5, np.sin(2 * np.pi * waves * radius) > 0
    elif name == "square":
        mask, pattern = np.ones_like(y, dtype=bool), np.sin(2 * np.pi * waves * (x + y)) > 0
    else:
        mask = np.abs(x - 0.5) <= y / 2
        pattern = (np.sin(2 * np.pi * waves * x) > 0) ^ (np.sin(2 * np.pi * waves * y) > 0)
    return mask, pattern[..., None].astype(float)


class CocoBoxes(Dataset):
    """COCO's 2017 data: ``DIR/train2017/*.jpg``, ``DIR/annotations/instances_train2017.json``.

    Images without a box and crowds are left out. Training images are mirrored half of the time.
    Labels are the positions of COCO's categories, in the order of
    their ids.

    Raises:
        UserError: the folder is not laid out like that.
    """

    def __init__(self, root: str, is_train: bool) -> None:
        split = "train2017" if is_train else "val2017"
        self.folder = Path(root) / split
        annotations = Path(root) / "annotations" / f"instances_{split}.json"
        for path in (self.folder, annotations):
            if not path.exists():
                raise UserError(f"a folder of COCO must hold {path.relative_to(root)}; got {root}")
        found: dict[str, Any] = json.loads(annotations.read_text())
        categories = sorted(found["categories"], key=lambda category: category["id"])
        self.classes = tuple(category["name"] for category in categories)
        label = {category["id"]: index for index, category in enumerate(categories)}
        self.objects: dict[int, list[tuple[list[float], int]]] = defaultdict(list)
        for one in found["annotations"]:
            x, y, width, height = one["bbox"]
            if width >= 1 and height >= 1 and not one.get("iscrowd"):
                box = [x, y, x + width, y + height]
                self.objects[one["image_id"]].append((box, label[one["category_id"]]))
        self.files = {image["id"]: image["file_name"] for image in found["images"]}
        self.ids = sorted(self.objects)
        self.is_train = is_train

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        with Image.open(self.folder / self.files[self.ids[index]]) as file:
            pixels = np.array(file.convert("RGB"))
        image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        boxes = torch.tensor([box for box, _ in self.objects[self.ids[index]]])
        labels = torch.tensor([label for _, label in self.objects[self.ids[index]]])
        if self.is_train and torch.rand(()) < 0.5:
            image = image.flip(2)
            boxes[:, [0, 2]] = image.shape[2] - boxes[:, [2, 0]]
        return image, {"boxes": boxes, "labels": labels}
