"""Data sets by name: the embedded digits, or timm's, with errors a user can act on."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path
from typing import Any

import timm.data
from torch.utils.data import IterableDataset

from timm_structdrop.data.augment import ToMode, TransformedFirst, own_size_transforms
from timm_structdrop.data.digits import DigitsDataset
from timm_structdrop.data.images import ReadImageFile, WholeImageDataset
from timm_structdrop.data.layout import TORCH_LAYOUTS, expected_and_found
from timm_structdrop.data.subset import balanced_subset
from timm_structdrop.data.tiny_imagenet import HOW_TO_GET, TinyImageNet
from timm_structdrop.errors import UserError, nearest

TRAIN_SPLITS = ("train", "training")
VALIDATION_SPLITS = ("validation", "val", "valid", "eval", "evaluation")
SPLITS = (TRAIN_SPLITS, VALIDATION_SPLITS, ("test",))
FOLDER_NAMES = ("", "folder", "image_folder", "imagefolder", "tar")
TORCH_FOLDERS = ("torch/folder", "torch/image_folder")
TORCH_TRAIN_OR_TEST = (
    "torch/cifar10",
    "torch/cifar100",
    "torch/mnist",
    "torch/kmnist",
    "torch/fashion_mnist",
    "torch/qmnist",
)
TORCH_NAMES = (
    *TORCH_TRAIN_OR_TEST,
    *TORCH_FOLDERS,
    "torch/imagenet",
    "torch/inat",
    "torch/inaturalist",
    "torch/places365",
)
HUB_PREFIXES = ("hfds", "hfids", "tfds", "wds")


def dataset_names() -> list[str]:
    """Every data set name there is; those of a library end in `/NAME`."""
    named = [name for name in FOLDER_NAMES if name]
    return [
        "digits",
        "tiny_imagenet",
        *named,
        *TORCH_NAMES,
        *(f"{prefix}/NAME" for prefix in HUB_PREFIXES),
    ]


def create_dataset(
    name: str,
    root: str | None = None,
    split: str = "train",
    *,
    is_training: bool = False,
    input_img_mode: str | None = None,
    class_map: str = "",
    download: bool = False,
    seed: int = 42,
    crop_padding: int = 0,
    rotation: float = 0.0,
    shift: int = 0,
    share: float | None = None,
    share_seed: int = 42,
    **kwargs: Any,
) -> Any:
    """A data set of (PIL image, class) pairs with the `transform` attribute timm's loaders set.

    `name` is `"digits"`, `"tiny_imagenet"` (`TinyImageNet`) or anything that
    `timm.data.create_dataset` takes: `""` for folders and tar files of images, `torch/cifar10`,
    `hfds/...`; `kwargs` go there. `input_img_mode` is the PIL mode of the images (default RGB).
    `crop_padding`, `rotation` and `shift` are random augmentations at the image's own size
    (`own_size_transforms`), before `transform`. `share` in (0, 1] keeps that share of every class,
    drawn with `share_seed` (`balanced_indices`).

    Raises `UserError` for names, folders, splits and files that are not there or not usable, at
    once where it can be known and otherwise from the sample that can't be read.
    """
    name = _known_name(name)
    mode = input_img_mode or "RGB"
    first = own_size_transforms(crop_padding, rotation, shift)
    if name == "digits":
        dataset: Any = DigitsDataset(_is_train(name, split), mode)
    elif name == "tiny_imagenet":
        dataset = _tiny_imagenet(root, split, mode, download)
    elif name in FOLDER_NAMES:
        dataset = _image_files(root, split, mode, class_map, kwargs.get("input_key"))
    elif name in TORCH_NAMES:
        dataset = _torchvision(name, root, split, mode, download)
        if name not in TORCH_FOLDERS:
            first = [*first, ToMode(mode)]
    else:
        dataset = _from_library(
            name,
            root=root,
            split=split,
            is_training=is_training,
            input_img_mode=mode,
            class_map=class_map,
            download=download,
            seed=seed,
            **kwargs,
        )
    if share is not None:
        dataset = balanced_subset(dataset, share, share_seed)
    if not first:
        return dataset
    if isinstance(dataset, IterableDataset):
        raise UserError(f"crop_padding, rotation and shift need a map-style data set; got {name}")
    return TransformedFirst(dataset, first)


def class_names(dataset: Any) -> list[str] | None:
    """The class names of a data set made here, wrapped or not, by index; None if not known."""
    while not hasattr(dataset, "class_to_idx") and not hasattr(dataset, "reader"):
        if not hasattr(dataset, "dataset"):
            return None
        dataset = dataset.dataset
    by_name = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    return [str(name) for name in sorted(by_name, key=by_name.get)] if by_name else None


def _known_name(name: str) -> str:
    prefix, slash, _ = name.partition("/")
    if slash and prefix.lower() in HUB_PREFIXES:
        return name
    if name.lower() in dataset_names() or not name:
        return name.lower()
    raise UserError(f"unknown dataset {name!r}{nearest(name, dataset_names())}")


def _is_train(name: str, split: str) -> bool:
    valid = (*TRAIN_SPLITS, *VALIDATION_SPLITS, "test")
    if split not in valid:
        raise UserError(f"unknown split {split!r} of {name}{nearest(split, valid)}")
    return split in TRAIN_SPLITS


def _existing_root(name: str, root: str | None) -> Path:
    if not root:
        raise UserError(f"dataset {name or 'folder'} needs its folder: --data-dir; got none")
    path = Path(root)
    if not path.exists():
        raise UserError(f"data folder must exist; got {root}")
    return path


def has_splits(root: str | Path) -> bool:
    """Whether a folder of images has folders for training, validation or test images."""
    return bool(_split_folders(Path(root)))


def _split_folders(root: Path) -> list[str]:
    return [name for group in SPLITS for name in group if (root / name).is_dir()]


def _check_split_folder(root: Path, split: str) -> None:
    """timm takes the whole root where the split has no folder, so training images would be
    counted as validation images."""
    split = split.split("[")[0]
    wanted = next((group for group in SPLITS if split in group), (split,))
    found = _split_folders(root)
    if found and not any((root / folder).is_dir() for folder in wanted):
        raise UserError(
            f"data folder must have a folder for the split {split!r} ({', '.join(wanted)}); "
            f"{root} has {', '.join(found)}"
        )


def _check_class_map(class_map: str, root: Path) -> None:
    if class_map and not any(path.is_file() for path in (Path(class_map), root / class_map)):
        raise UserError(f"class map must be an existing file; got {class_map}")
    if class_map and not class_map.lower().endswith((".txt", ".pkl")):
        raise UserError(f"class map must be a .txt or .pkl file; got {class_map}")


def _image_files(
    root: str | None, split: str, mode: str, class_map: str, input_key: str | None
) -> WholeImageDataset:
    path = _existing_root("", root)
    if path.is_file() and path.suffix != ".tar":
        raise UserError(f"data folder must be a folder or a .tar file of images; got file {root}")
    _check_class_map(class_map, path)
    if path.is_dir():
        if (path / "wnids.txt").is_file():
            raise UserError(
                f"data folder must hold a folder of images for each class; {root} has the layout "
                "of Tiny ImageNet (--dataset tiny_imagenet)"
            )
        _check_split_folder(path, split)
    try:
        found = timm.data.create_dataset(
            "", root, split, class_map=class_map, input_img_mode=mode, input_key=input_key
        )
    except (RuntimeError, ValueError, pickle.UnpicklingError, tarfile.TarError) as error:
        raise UserError(
            f"data folder must hold a folder of images for each class; {root} holds none "
            f"for the split {split!r} ({error})"
        ) from error
    dataset = WholeImageDataset(root, reader=found.reader, input_img_mode=mode)
    classes = class_names(dataset)
    if classes is not None and len(classes) < 2:
        raise UserError(
            f"data folder must hold a folder of images for each of at least 2 classes; {root} "
            f"has images of one class for the split {split!r}"
        )
    return dataset


def _tiny_imagenet(root: str | None, split: str, mode: str, download: bool) -> TinyImageNet:
    if split == "test":
        raise UserError("the test split of tiny_imagenet has no labels: use validation; got test")
    if download and not (root and Path(root).exists()):
        raise UserError(f"tiny_imagenet cannot be downloaded by --dataset-download: {HOW_TO_GET}")
    path = _existing_root("tiny_imagenet", root)
    return TinyImageNet(path, _is_train("tiny_imagenet", split), mode)


def _torchvision(name: str, root: str | None, split: str, mode: str, download: bool) -> Any:
    if not root:
        raise UserError(f"dataset {name} needs the folder it is kept in: --data-dir; got none")
    if Path(root).is_file():
        raise UserError(f"data folder must be a folder; got file {root}")
    kwargs: dict[str, Any] = {}
    if name in TORCH_FOLDERS:
        _check_split_folder(_existing_root(name, root), split)
        kwargs["loader"] = ReadImageFile(mode)
    elif name in TORCH_TRAIN_OR_TEST:
        _is_train(name, split)
    try:
        return timm.data.create_dataset(name, root, split, download=download, **kwargs)
    except (RuntimeError, OSError, ValueError) as error:
        if name in TORCH_FOLDERS or not download:
            what_to_do = _how_to_get(name)
            layout = ""
            if name in TORCH_LAYOUTS:
                layout = f"; {expected_and_found(TORCH_LAYOUTS[name], Path(root))}"
            raise UserError(
                f"data folder must hold {name}{what_to_do}; {root}: {error}{layout}"
            ) from error
        raise UserError(f"{name} cannot be downloaded to {root}: {error}") from error


def _how_to_get(name: str) -> str:
    if name in TORCH_FOLDERS:
        return ""
    if name == "torch/imagenet":
        return " (it has to be downloaded by hand)"
    return " (--dataset-download fetches it)"


def _from_library(name: str, **kwargs: Any) -> Any:
    try:
        return timm.data.create_dataset(name, **kwargs)
    except ImportError as error:
        raise UserError(f"dataset {name} needs a package that is not installed: {error}") from error
