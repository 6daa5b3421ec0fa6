"""Image files that must be whole: an unreadable one stops the run instead of being replaced."""

from __future__ import annotations

from typing import Any, BinaryIO

from PIL import Image
from timm.data import ImageDataset

from timm_structdrop.errors import UserError, one_line


def read_image(file: str | BinaryIO, mode: str | None) -> Image.Image:
    """Decode all of an image, converted to `mode` where one is given."""
    with Image.open(file) as image:
        return image.convert(mode) if mode else image.copy()


def unreadable(name: object, error: Exception) -> UserError:
    """The error to raise for image `name`, which failed with `error`."""
    return UserError(f"images must be readable; got {name} ({one_line(error)})")


class ReadImageFile:
    """A loader for torchvision's `ImageFolder`, with `UserError` for files it can't read."""

    def __init__(self, mode: str | None) -> None:
        self.mode = mode

    def __call__(self, path: str) -> Image.Image:
        try:
            return read_image(path, self.mode)
        except MemoryError:
            raise
        except Exception as error:
            raise unreadable(path, error) from error


class WholeImageDataset(ImageDataset):
    """timm's `ImageDataset`, which raises `UserError` naming the image that it can't read.

    timm's own takes the next image, with a warning, in place of one that fails.
    """

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}; got {index}")
        try:
            file, target = self.reader[index]
            with file:
                image = read_image(file, self.input_img_mode)
        except MemoryError:
            raise
        except Exception as error:  # decoders fail with OSError, SyntaxError, struct.error, ...
            raise unreadable(self._name(index), error) from error
        if self.transform is not None:
            image = self.transform(image)
        return image, -1 if target is None else target

    def _name(self, index: int) -> object:
        try:
            return self.filename(index, absolute=True)
        except Exception:  # not every reader knows file names
            return f"sample {index}"
