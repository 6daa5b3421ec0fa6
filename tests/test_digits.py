"""The embedded digits, and data sets by name with the errors of folders that are not right."""

import hashlib
import re
import struct
import tarfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_loader
from torch.utils.data import DataLoader

from timm_structdrop.data import (
    DigitsDataset,
    class_names,
    create_dataset,
    own_size_transforms,
)
from timm_structdrop.errors import UserError


def test_the_split_is_stratified_disjoint_and_fixed():
    train, validation = DigitsDataset(True), DigitsDataset(False)
    assert (len(train), len(validation)) == (1437, 360)
    both = np.concatenate([train.indices, validation.indices])
    assert sorted(both) == list(range(1797))
    share = np.bincount(validation.targets) / np.bincount(load_digits().target)
    assert np.all(np.abs(share - 360 / 1797) < 0.004)
    digest = hashlib.sha256(validation.indices.astype("<i8").tobytes()).hexdigest()
    assert digest.startswith("2fbaae31b8c6")


def test_images_are_the_gray_levels_scaled():
    source, dataset = load_digits(), DigitsDataset(True, "L")
    image, target = dataset[7]
    row = dataset.indices[7]
    assert (image.mode, image.size, type(target)) == ("L", (8, 8), int)
    assert target == source.target[row]
    np.testing.assert_array_equal(np.asarray(image), np.rint(source.images[row] / 16 * 255))
    assert np.asarray(dataset.images).max() == 255
    color = np.asarray(DigitsDataset(True, "RGB")[7][0])
    assert color.shape == (8, 8, 3)
    assert (color == np.asarray(image)[..., None]).all()


def test_timms_loader_upscales_them():
    dataset = create_dataset("digits", split="validation", input_img_mode="L")
    loader = create_loader(
        dataset,
        input_size=(1, 32, 32),
        batch_size=360,
        mean=(0.5,),
        std=(0.5,),
        num_workers=0,
        device=torch.device("cpu"),
    )
    images, targets = next(iter(loader))
    assert images.shape == (360, 1, 32, 32)
    assert targets.tolist() == dataset.targets
    assert images.min() >= -1.01 and images.max() <= 1.01 and images.std() > 0.5


def test_names_modes_and_splits():
    for split in ("validation", "val", "test"):
        assert len(create_dataset("DIGITS", split=split)) == 360
    assert create_dataset("digits")[0][0].mode == "RGB"
    assert class_names(create_dataset("digits", shift=1)) == list("0123456789")


def spread(transforms: list, image: Image.Image, n: int = 60) -> set[bytes]:
    torch.manual_seed(0)
    results = set()
    for _ in range(n):
        result = image
        for transform in transforms:
            result = transform(result)
        assert result.size == image.size
        results.add(result.tobytes())
    return results


def rolled(pixels: np.ndarray, mode: str, by: int) -> set[bytes]:
    """Every shift by up to `by` pixels, cut out of the padded image."""
    height, width = pixels.shape
    padded = np.pad(pixels, by, mode)
    offsets = [(y, x) for y in range(2 * by + 1) for x in range(2 * by + 1)]
    return {padded[y : y + height, x : x + width].tobytes() for y, x in offsets}


@pytest.mark.parametrize(
    ("settings", "padding"), [({"shift": 1}, "edge"), ({"crop_padding": 1}, "constant")]
)
def test_shifts_and_crops_are_all_the_small_moves(settings, padding):
    pixels = np.arange(1, 43, dtype=np.uint8).reshape(6, 7)
    found = spread(own_size_transforms(**settings), Image.fromarray(pixels))
    assert found == rolled(pixels, padding, 1)


def test_rotation_turns_and_nothing_is_nothing():
    pixels = np.arange(1, 65, dtype=np.uint8).reshape(8, 8)
    assert len(spread(own_size_transforms(rotation=10.0), Image.fromarray(pixels), 5)) == 5
    assert own_size_transforms() == []


@pytest.mark.parametrize("settings", [{"shift": -1}, {"crop_padding": -2}, {"rotation": 181}])
def test_wrong_amounts(settings):
    ((name, value),) = settings.items()
    with pytest.raises(UserError, match=f"{name} must be .*; got {value}"):
        create_dataset("digits", **settings)


def test_augmentation_runs_before_the_transform():
    dataset = create_dataset("digits", input_img_mode="L", shift=1)
    seen = []
    dataset.transform = lambda image: seen.append(image) or len(seen)
    torch.manual_seed(0)
    assert [dataset[3][0] for _ in range(40)] == list(range(1, 41))
    shapes = {np.asarray(image).tobytes() for image in seen}
    source = np.asarray(DigitsDataset(True, "L")[3][0])
    assert len(shapes) > 1 and shapes <= rolled(source, "edge", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("name", ["", "folder", "ImageFolder", "torch/image_folder"])
def test_folders_of_images(folder, name):
    dataset = create_dataset(name, str(folder), "validation", input_img_mode="L")
    assert len(dataset) == 4
    assert [target for _, target in dataset] == [0, 0, 1, 1]
    assert dataset[0][0].mode == "L"
    assert class_names(dataset) == ["ant", "bee"]


# timm's tar reader leaves its file open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_tar_of_images(folder, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(folder / "train", arcname="train")
    dataset = create_dataset("", str(tmp_path / "x.tar"), crop_padding=2)
    assert len(dataset) == 4 and dataset[3][1] == 1


def test_torchvisions_images_come_in_the_mode_asked_for(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):  # idx: type and dimensions, sizes, bytes
        images = struct.pack(">4B3I", 0, 0, 8, 3, 3, 28, 28) + pixels.tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">4BI", 0, 0, 8, 1, 3) + bytes([4, 0, 9])
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    for mode, shape in (("L", (28, 28)), ("RGB", (28, 28, 3))):
        dataset = create_dataset("torch/mnist", str(tmp_path), "val", input_img_mode=mode)
        image, target = dataset[2]
        assert (np.asarray(image).shape, target) == (shape, 9)
        np.testing.assert_array_equal(np.asarray(image.convert("L")), pixels[2])
    assert class_names(dataset)[9] == "9 - nine"


def error_of(*args: object, **kwargs: object) -> str:
    with pytest.raises(UserError) as raised:
        create_dataset(*args, **kwargs)
    return str(raised.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("digit",), "unknown dataset 'digit' (nearest: digits"),
        (("cifar10", "{root}"), "unknown dataset 'cifar10' (nearest: torch/cifar10"),
        (("digits", None, "trian"), "unknown split 'trian' of digits (nearest: train"),
        (("torch/cifar10", "{root}", "trian"), "unknown split 'trian' of torch/cifar10 (nearest:"),
        (("", None), "dataset folder needs its folder: --data-dir; got none"),
        (("torch/mnist", None), "dataset torch/mnist needs the folder it is kept in: --data-dir"),
        (("", "{root}/gone"), "data folder must exist; got {root}/gone"),
        (("", "{root}/empty"), "must hold a folder of images for each class; {root}/empty holds"),
        (("", "{root}/file.txt"), "must be a folder or a .tar file of images; got file {root}/"),
        (("torch/mnist", "{root}/file.txt"), "data folder must be a folder; got file {root}/file"),
        (("", "{root}/half", "validation"), "'validation' (validation, val, valid, eval, "),
        (("", "{root}/half", "validation"), "{root}/half has train"),
        (("torch/folder", "{root}/half", "val"), "{root}/half has train"),
        (("torch/mnist", "{root}"), "--dataset-download fetches it); {root}: Dataset not found"),
        (("torch/imagenet", "{root}"), "(it has to be downloaded by hand); {root}"),
        (("hfds/x/y",), "dataset hfds/x/y needs a package that is not installed: "),
    ],
)
def test_what_is_not_there_or_not_usable(tmp_path, monkeypatch, args, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "train").mkdir(parents=True)
    (tmp_path / "file.txt").write_text("x")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    filled = [arg.format(root=tmp_path) if isinstance(arg, str) else arg for arg in args]
    assert message.format(root=tmp_path) in error_of(*filled)


def test_a_broken_tar_and_class_maps(folder, tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar")
    assert "x.tar" in error_of("", str(tmp_path / "x.tar"))
    assert "must be an existing file; got m.txt" in error_of("", str(folder), class_map="m.txt")
    (folder / "m.csv").write_text("ant")
    assert "must be a .txt or .pkl file; got m.csv" in error_of("", str(folder), class_map="m.csv")
    (folder / "m.txt").write_text("bee\nant\n")
    dataset = create_dataset("", str(folder), class_map=str(folder / "m.txt"))
    assert [target for _, target in dataset] == [1, 1, 0, 0]


def test_a_download_that_fails_says_so(tmp_path, monkeypatch):
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", no_network)
    message = error_of("torch/cifar10", str(tmp_path), download=True)
    assert message == f"torch/cifar10 cannot be downloaded to {tmp_path}: no route to host"


@pytest.mark.parametrize("name", ["", "torch/folder"])
@pytest.mark.parametrize(
    ("damage", "workers"), [("half", 0), ("text", 0), ("empty", 0), ("gone", 0), ("half", 2)]
)
def test_an_unreadable_image_is_named_with_any_number_of_workers(folder, name, damage, workers):
    file = folder / "train" / "bee" / "1.png"
    dataset = create_dataset(name, str(folder), shift=1)
    whole = file.read_bytes()
    file.write_bytes({"half": whole[: len(whole) // 2], "text": b"hello"}.get(damage, b""))
    if damage == "gone":
        file.unlink()
    dataset.transform = np.array
    loader = DataLoader(dataset, batch_size=1, num_workers=workers)
    with pytest.raises(
        UserError, match=rf"^images must be readable; got {re.escape(str(file))} "
    ) as raised:
        list(loader)
    # Its frames keep the loader's workers, which hang when the garbage collector stops them.
    traceback.clear_frames(raised.tb)


def test_images_beside_each_other_are_no_classes(tmp_path):
    for index in range(3):
        Image.new("L", (8, 8), index).save(tmp_path / f"{index}.png")
    with pytest.raises(UserError, match=r"at least 2 classes; .* has images of one class"):
        create_dataset("", str(tmp_path), "train")
