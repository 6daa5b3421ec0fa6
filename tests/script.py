"""The commands at the top of the repository as modules, and a folder of images for them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent


def load_script(name: str) -> ModuleType:
    """`name`.py of the repository's top folder, imported once under the name `name`_script."""
    module_name = f"{name}_script"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, ROOT / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module_name])
    return sys.modules[module_name]


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
