"""The corruptions of ImageNet-C (Hendrycks & Dietterich 2019, arXiv:1903.12261) on any data set.

The corruptions themselves are those of the library ``imagecorruptions``, in its maintained form
``imagecorruptions-imaug``; here they are made repeatable, and fit for gray and small images.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from timm_structdrop.data.wrapper import DatasetWrapper
from timm_structdrop.errors import UserError, nearest, one_line

__all__ = [
    "CORRUPTIONS",
    "PAPER_CORRUPTIONS",
    "SEVERITIES",
    "CorruptedDataset",
    "corrupt",
    "load_corruptions",
    "parse_corruptions",
    "parse_severities",
]

# The noises and blurs are the seven of DropCluster's Table 5 and Figs. 9 and 10.
NOISES = ("gaussian_noise", "shot_noise", "impulse_noise")
BLURS = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur")
WEATHER = ("snow", "frost", "fog", "brightness")
DIGITAL = ("contrast", "elastic_transform", "pixelate", "jpeg_compression")
PAPER_CORRUPTIONS = (*NOISES, *BLURS)
CORRUPTIONS = (*PAPER_CORRUPTIONS, *WEATHER, *DIGITAL)
SEVERITIES = (1, 2, 3, 4, 5)

# These take a seed; the others draw from numpy's global generator.
OWN_GENERATOR = ("impulse_noise", "glass_blur")


def parse_corruptions(text: str) -> tuple[str, ...]:
    """``all``, ``paper`` (the seven of DropCluster) or names with commas, in ImageNet-C's order.

    Raises:
        UserError: a name is unknown.
    """
    names: set[str] = set()
    for name in (part.strip() for part in text.split(",")):
        if name in ("all", "paper"):
            names.update(CORRUPTIONS if name == "all" else PAPER_CORRUPTIONS)
        elif name in CORRUPTIONS:
            names.add(name)
        else:
            raise _unknown(name)
    return tuple(name for name in CORRUPTIONS if name in names)


def _unknown(name: str) -> UserError:
    return UserError(
        f"corruptions must be all, paper or of {', '.join(CORRUPTIONS)}; "
        f"got {name!r}{nearest(name, CORRUPTIONS)}"
    )


def parse_severities(text: str) -> tuple[int, ...]:
    """``1-5``, ``1,3,5`` or a mixture of both to sorted severities.

    Raises:
        UserError: a severity is not one of 1 to 5, or a range runs backwards.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([1-5])(?:-([1-5]))?", part.strip())
        severities = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not severities:
            raise UserError(f"severities must be 1 to 5, as 1-5 or 1,3,5; got {text!r}")
        found.update(severities)
    return tuple(sorted(found))


def load_corruptions() -> Any:
    """The module ``imagecorruptions.corruptions``, one function for each corruption.

    Raises:
        UserError: the library is not installed.
    """
    try:
        return import_module("imagecorruptions.corruptions")
    except ImportError as error:
        raise UserError(
            "corruptions need imagecorruptions-imaug: "
            f'pip install "timm-structdrop[robustness]"; it cannot be imported ({one_line(error)})'
        ) from error


def corrupt(
    image: NDArray[np.uint8], corruption: str, severity: int, seed: Sequence[int] | int = 0
) -> NDArray[np.uint8]:
    """A corrupted copy of an image, a pure function of its arguments.

    numpy's global generator, from which most corruptions draw, is as before afterwards. A gray
    image stays gray: noise is drawn once for a pixel, the colours of frost become their luma.

    Args:
        image: (H, W), or (H, W, C) with 1 or 3 channels, 0 to 255; any size the corruption knows
            how to handle, which is 4 x 4 and more for all of them.
        corruption: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        seed: one or more integers >= 0.

    Returns:
        An array like ``image``.

    Raises:
        UserError: the corruption or the severity is unknown, the image is neither gray nor RGB, or
            too small for the corruption; or the library is not installed.
    """
    name = corruption
    if name not in CORRUPTIONS:
        raise _unknown(name)
    if severity not in SEVERITIES:
        raise UserError(f"severities must be 1 to 5, as 1-5 or 1,3,5; got {severity!r}")
    channels = 1 if image.ndim == 2 else image.shape[-1]
    if image.ndim not in (2, 3) or channels not in (1, 3):
        raise UserError(f"corruptions need gray or RGB images (H, W[, 1 or 3]); got {image.shape}")
    function = getattr(load_corruptions(), name)
    colour = np.broadcast_to(image.reshape(*image.shape[:2], channels), (*image.shape[:2], 3))
    words = np.random.SeedSequence(seed).generate_state(2)
    own = {"seed": int(words[1])} if name in OWN_GENERATOR else {}
    with _seeded_numpy(int(words[0])):
        try:
            found = np.asarray(function(Image.fromarray(colour.copy()), severity, **own)).astype(
                np.uint8
            )
        except (ValueError, IndexError, ZeroDivisionError) as error:
            height, width = image.shape[:2]
            raise UserError(
                f"{name} at severity {severity} needs larger images; got {height} x {width} "
                f"({one_line(error)})"
            ) from error
    if channels == 3:
        return found
    gray = found[..., 0] if name in NOISES else np.asarray(Image.fromarray(found).convert("L"))
    return gray.reshape(image.shape)


@contextmanager
def _seeded_numpy(seed: int) -> Iterator[None]:
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


class CorruptedDataset(DatasetWrapper):
    """A map-style data set whose images are corrupted after its own ``transform``.

    As in ImageNet-C the image is corrupted at the size at which the model sees it, before it is
    normalised: the transform has to end with uint8 tensors (C, H, W), as that of timm's
    ``create_loader`` does with the prefetcher. Sample i is a pure function of (seed, i, corruption,
    severity), whatever the batch size and the number of workers; the choice lies in shared memory,
    where running workers see :meth:`choose`.

    Raises:
        UserError: ``dataset`` is iterable, so that its samples have no index, or ``seed`` < 0.
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        if isinstance(dataset, IterableDataset):
            raise UserError(
                "corruptions need a map-style data set, whose images have an index; "
                f"got {type(dataset).__name__}"
            )
        if seed < 0:
            raise UserError(f"seed must be at least 0; got {seed}")
        super().__init__(dataset)
        self.seed = seed
        self._choice = torch.tensor([-1, 0]).share_memory_()

    def choose(self, corruption: str | None, severity: int = 1) -> None:
        """The corruption of the samples from the next loader iteration on; None for none.

        What the corruption needs at its first call (a compiler runs for glass_blur) is done here
        once, so that workers forked afterwards find it done.
        """
        if corruption is not None:
            corrupt(np.zeros((16, 16), dtype=np.uint8), corruption, severity)
        index = -1 if corruption is None else CORRUPTIONS.index(corruption)
        self._choice.copy_(torch.tensor([index, severity]))

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, target = self.dataset[index]
        chosen, severity = self._choice.tolist()
        if chosen < 0:
            return image, target
        pixels = np.ascontiguousarray(image.numpy().transpose(1, 2, 0))
        seed = (self.seed, index, chosen, severity)
        corrupted = corrupt(pixels, CORRUPTIONS[chosen], severity, seed)
        return torch.from_numpy(corrupted.transpose(2, 0, 1).copy()), target
