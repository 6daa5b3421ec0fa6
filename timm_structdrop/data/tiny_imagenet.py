"""Tiny ImageNet as it is published: the zip file, or the folder that it unpacks to."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from torch.utils.data import Dataset

from timm_structdrop.data.images import read_image, unreadable
from timm_structdrop.data.layout import expected_and_found
from timm_structdrop.errors import UserError, one_line

__all__ = ["TinyImageNet"]

NAME = "tiny-imagenet-200"
LAYOUT = (
    f"{NAME}.zip, or its content: wnids.txt, words.txt, train/<wnid>/images/ and val/ with images/ "
    "and val_annotations.txt"
)
HOW_TO_GET = (
    f"{NAME}.zip has to be downloaded by hand (http://cs231n.stanford.edu/{NAME}.zip); name it, or "
    "what it unpacks to, with --data-dir"
)


class TinyImageNet(Dataset):
    """Tiny ImageNet (CS231N 2017): 200 classes, 64x64, as (PIL image, class 0-199) pairs.

    100,000 images to train on, from ``train/<wnid>/images``, and 10,000 for validation, from
    ``val/images``, with the class that ``val_annotations.txt`` gives each. Classes are numbered in
    the order of their sorted WordNet ids, as ``ImageFolder`` would. The published test split has no
    labels and cannot be chosen. Reads the zip file without unpacking it.

    Args:
        root: ``tiny-imagenet-200.zip``, the unpacked folder, or the folder that either lies in.
        is_train: the training images, else those for validation.
        input_img_mode: PIL mode of the images; some of the files are gray.
        transform: of the image; timm's ``create_loader`` assigns it.

    Attributes:
        targets: the class of each sample.
        class_to_idx: classes by WordNet id.
        words: what ``words.txt`` calls each WordNet id of these classes.

    Raises:
        UserError: the folder or the zip file is not of this layout.
    """

    def __init__(
        self,
        root: str | Path,
        is_train: bool,
        input_img_mode: str = "RGB",
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        self.files = _open(Path(root))
        wnids = sorted(self.files.text("wnids.txt").split())
        self.class_to_idx = {wnid: index for index, wnid in enumerate(wnids)}
        self.words = self._words()
        samples = self._train_samples() if is_train else self._validation_samples()
        self.names = [name for name, _ in samples]
        self.targets = [target for _, target in samples]
        self.input_img_mode = input_img_mode
        self.transform = transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        name = self.names[index]
        try:
            with self.files.open(name) as file:
                image = read_image(file, self.input_img_mode)
        except MemoryError:
            raise
        except Exception as error:  # decoders fail with OSError, SyntaxError, struct.error, ...
            raise unreadable(f"{self.files.path}: {name}", error) from error
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def _words(self) -> dict[str, str]:
        if "words.txt" not in self.files.names:
            return {}
        lines = (line.partition("\t") for line in self.files.text("words.txt").splitlines())
        return {wnid: words.strip() for wnid, _, words in lines if wnid in self.class_to_idx}

    def _train_samples(self) -> list[tuple[str, int]]:
        samples = []
        for name in sorted(self.files.names):
            parts = name.split("/")
            if len(parts) == 4 and parts[0] == "train" and parts[2] == "images":
                if parts[1] not in self.class_to_idx:
                    raise self._wrong(f"train/{parts[1]} to be one of the ids in wnids.txt")
                samples.append((name, self.class_to_idx[parts[1]]))
        lacking = sorted(set(range(len(self.class_to_idx))) - {target for _, target in samples})
        if lacking:
            wnid = list(self.class_to_idx)[lacking[0]]
            raise self._wrong(
                f"images of every id in wnids.txt; {len(lacking)} have none, such as "
                f"train/{wnid}/images/"
            )
        return samples

    def _validation_samples(self) -> list[tuple[str, int]]:
        samples = []
        for line in self.files.text("val/val_annotations.txt").splitlines():
            file, wnid = [*line.split("\t"), "", ""][:2]
            if wnid not in self.class_to_idx:
                raise self._wrong(
                    "val/val_annotations.txt to hold a file's name and an id of wnids.txt, "
                    f"separated by a tab, in each line; a line is {line[:60]!r}"
                )
            samples.append((f"val/images/{file}", self.class_to_idx[wnid]))
        lacking = [name for name, _ in samples if name not in self.files.names]
        if lacking or not samples:
            raise self._wrong(
                f"the images that val/val_annotations.txt names; of {len(samples)}, "
                f"{len(lacking)} are not there{', such as ' if lacking else ''}"
                f"{''.join(lacking[:1])}"
            )
        return samples

    def _wrong(self, expected: str) -> UserError:
        return UserError(f"tiny_imagenet at {self.files.path}: expected {expected}")


class _Files:
    """The files under a folder, or under a folder of a zip file, by their names in it."""

    def __init__(self, path: Path, prefix: str, names: Iterable[str]) -> None:
        self.path = path
        self.prefix = prefix
        self.names = frozenset(names)
        self._zip: tuple[int, zipfile.ZipFile] | None = None

    def open(self, name: str) -> BinaryIO:
        """The content of a file of ``names``."""
        if self.path.is_dir():
            return open(self.path / name, "rb")
        if self._zip is None or self._zip[0] != os.getpid():
            # processes that share an open file would move one another's place in it
            self._zip = (os.getpid(), zipfile.ZipFile(self.path))
        return io.BytesIO(self._zip[1].read(self.prefix + name))

    def text(self, name: str) -> str:
        """A text file."""
        if name not in self.names:
            top = sorted({part.partition("/")[0] for part in self.names})
            raise UserError(
                f"tiny_imagenet at {self.path}: expected {LAYOUT}; found no {name}"
                f", but {', '.join(top[:6]) or 'nothing'}"
            )
        with self.open(name) as file:
            return file.read().decode("utf-8")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}


def _open(root: Path) -> _Files:
    """The files of what ``root`` names: a zip file, a folder, or a folder that holds one."""
    candidates = [root, root / NAME, root / f"{NAME}.zip"]
    chosen = next((path for path in candidates if _is_it(path)), None)
    if chosen is None:
        raise UserError(f"tiny_imagenet: {expected_and_found(LAYOUT, root)} ({HOW_TO_GET})")
    if chosen.is_dir():
        names = [
            (Path(folder) / file).relative_to(chosen).as_posix()
            for folder, _, files in os.walk(chosen, followlinks=True)
            for file in files
        ]
        return _Files(chosen, "", names)
    try:
        with zipfile.ZipFile(chosen) as file:
            names = file.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"tiny_imagenet needs a whole zip; {chosen}: {one_line(error)}") from error
    prefix = f"{NAME}/" if any(name.startswith(f"{NAME}/") for name in names) else ""
    inside = (name[len(prefix) :] for name in names if name.startswith(prefix))
    return _Files(chosen, prefix, (name for name in inside if name and not name.endswith("/")))


def _is_it(path: Path) -> bool:
    if path.is_dir():
        return any((path / part).exists() for part in ("wnids.txt", "val/val_annotations.txt"))
    return path.is_file() and path.suffix == ".zip"
