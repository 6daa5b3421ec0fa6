"""scikit-learn's handwritten digits: real images inside a dependency, nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from timm_structdrop.errors import UserError

N_VALIDATION = 360
SPLIT_SEED = 0


class DigitsDataset(Dataset):
    """The 1797 digits of `sklearn.datasets.load_digits` as (8x8 PIL image, class 0-9) pairs.

    Gray levels 0..16 become 0..255, background 0. `input_img_mode` is the images' mode, `"L"` or
    `"RGB"` (three equal channels). The split is fixed and stratified: `train_test_split` of
    scikit-learn with `test_size=360, random_state=0`, so 1437 images to train on and 360 for
    validation, every class in proportion. Set `transform`, as timm's `create_loader` does, to
    get tensors of the model's size.
    """

    classes = tuple("0123456789")

    def __init__(
        self,
        is_train: bool,
        input_img_mode: str = "RGB",
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        if input_img_mode not in ("L", "RGB"):
            raise UserError(f"input_img_mode must be L or RGB for digits; got {input_img_mode}")
        # scikit-learn takes a second to import: only who asks for digits pays for it.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, validation = train_test_split(
            np.arange(len(digits.target)),
            test_size=N_VALIDATION,
            stratify=digits.target,
            random_state=SPLIT_SEED,
        )
        self.indices = np.sort(train if is_train else validation)
        self.images = np.rint(digits.images[self.indices] * (255 / 16)).astype(np.uint8)
        self.targets = digits.target[self.indices].tolist()
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        self.input_img_mode = input_img_mode
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert(self.input_img_mode)
        return (image if self.transform is None else self.transform(image)), self.targets[index]
