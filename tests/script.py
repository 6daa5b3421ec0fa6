"""The commands that train and validate, and a folder of images for them."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent


def load_script(name: str) -> ModuleType:
    """The module of a command, which `name`.py at the top of the repository calls."""
    return import_module(f"timm_structdrop.cli.{name}")


def write_images(folder: Path, n_classes: int = 2, train: int = 24, validation: int = 8) -> Path:
    """A folder of gray 16x16 PNG images: class c is bright in column 2 + 6 c, under noise."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        for label in range(n_classes):
            (folder / split / f"class{label}").mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 100, (16, 16), dtype=np.uint8)
                pixels[:, 2 + 6 * label] += 120
                Image.fromarray(pixels).save(folder / split / f"class{label}" / f"{index}.png")
    return folder
