"""Data sets in their published formats, written small: CIFAR, MNIST, Tiny ImageNet; subsets."""

import hashlib
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from script import load_script, write_images
from torch.utils.data import DataLoader

from timm_structdrop.data import (
    TinyImageNet,
    balanced_indices,
    balanced_subset,
    class_names,
    create_dataset,
)
from timm_structdrop.data.subset import class_indices
from timm_structdrop.errors import UserError

WNIDS = ["n03", "n01", "n02"]
CIFAR = {"torch/cifar10": "CIFAR10", "torch/cifar100": "CIFAR100"}


def error_of(*args: object, **kwargs: object) -> str:
    with pytest.raises(UserError) as raised:
        create_dataset(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def cifar_batch(n: int, n_classes: int, key: str, seed: int) -> dict:
    """Rows of 3072 bytes, the red plane first, and labels, as the published pickles hold them."""
    data = np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)
    return {"data": data, key: [index % n_classes for index in range(n)]}


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of `name` with a few images; torchvision is told their checksums."""
    kind = getattr(torchvision.datasets, CIFAR[name])
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    n_classes, key = (10, "labels") if name == "torch/cifar10" else (100, "fine_labels")
    files = [entry[0] for entry in kind.train_list + kind.test_list]
    contents = {file: cifar_batch(n_classes, n_classes, key, i) for i, file in enumerate(files)}
    contents[kind.meta["filename"]] = {kind.meta["key"]: [f"c{i}" for i in range(n_classes)]}
    checksums = {}
    for file, content in contents.items():
        raw = pickle.dumps(content)
        (folder / file).write_bytes(raw)
        checksums[file] = hashlib.md5(raw).hexdigest()
    for which in ("train_list", "test_list"):
        listed = [[file, checksums[file]] for file, _ in getattr(kind, which)]
        monkeypatch.setattr(kind, which, listed)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": checksums[kind.meta["filename"]]})
    return folder


def test_cifar_10(tmp_path, monkeypatch):
    name = "torch/cifar10"
    folder = write_cifar(tmp_path, name, monkeypatch)
    train = create_dataset(name, str(tmp_path), "train", crop_padding=4, rotation=15.0)
    assert len(train) == 50 and len(create_dataset(name, str(tmp_path), "validation")) == 10
    image, target = create_dataset(name, str(tmp_path), "train")[12]
    stored = pickle.loads((folder / "data_batch_2").read_bytes())
    np.testing.assert_array_equal(
        np.asarray(image), stored["data"][2].reshape(3, 32, 32).transpose(1, 2, 0)
    )
    assert (target, image.size, train[0][0].size) == (2, (32, 32), (32, 32))
    assert class_names(train)[3] == "c3"
    (folder / "data_batch_3").write_bytes(b"other bytes")
    message = error_of(name, str(tmp_path))
    assert "not found or corrupted" in message and "found cifar-10-batches-py/" in message


def test_cifar_100_and_a_wrong_layout(tmp_path, monkeypatch):
    write_cifar(tmp_path, "torch/cifar100", monkeypatch)
    train = create_dataset("torch/cifar100", str(tmp_path), "train")
    assert len(train) == 100 and len(class_names(train)) == 100 and train[99][1] == 99
    message = error_of("torch/cifar10", str(tmp_path))
    assert "expected cifar-10-batches-py/ with data_batch_1 to 5" in message
    assert message.endswith("found cifar-100-python/")


def write_idx(root: Path, folder: str = "MNIST") -> np.ndarray:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):  # idx: type and dimensions, sizes, bytes
        images = struct.pack(">4B3I", 0, 0, 8, 3, 20, 28, 28) + pixels.tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">4BI", 0, 0, 8, 1, 20) + bytes(range(10)) * 2
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    return pixels


def test_mnist_trains_through_the_command(tmp_path):
    write_idx(tmp_path)
    load_script("train").main(
        f"--dataset torch/mnist --data-dir {tmp_path} --model lenet5 --num-classes 10 --in-chans 1 "
        "--img-size 32 --epochs 1 --batch-size 5 --workers 0 --device cpu --warmup-epochs 0 "
        f"--train-fraction 0.5 --crop-padding 4 --output {tmp_path} --experiment run".split()
    )
    rows = (tmp_path / "run" / "summary.csv").read_text().splitlines()
    assert len(rows) == 2
    message = error_of("torch/mnist", str(tmp_path / "run"))
    assert "expected MNIST/raw/ with train-" in message and "args.yaml" in message


def write_tiny(root: Path) -> Path:
    """tiny-imagenet-200 with 3 classes, 4 training images of each, 5 for validation."""
    folder = root / "tiny-imagenet-200"
    for wnid in WNIDS:
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        for index in range(4):
            pixels = np.full((64, 64, 3), 60 * WNIDS.index(wnid) + index, dtype=np.uint8)
            image = Image.fromarray(pixels)
            image = image.convert("L") if index == 3 else image  # some of the published are gray
            image.save(images / f"{wnid}_{index}.JPEG")
        boxes = "".join(f"{wnid}_{index}.JPEG\t0\t0\t62\t62\n" for index in range(4))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
    (folder / "wnids.txt").write_text("\n".join(WNIDS))
    words = [*((wnid, f"word of {wnid}, other word") for wnid in WNIDS), ("n99", "not here")]
    (folder / "words.txt").write_text("".join(f"{wnid}\t{text}\n" for wnid, text in words))
    lines = []
    for split in ("val", "test"):
        (folder / split / "images").mkdir(parents=True)
        for index in range(5):
            wnid = WNIDS[index % 3]
            pixels = np.full((64, 64, 3), 60 * WNIDS.index(wnid), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / "images" / f"{split}_{index}.JPEG")
            lines.append(f"{split}_{index}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines[:5]))
    return folder


def zipped(folder: Path, target: Path, strip: bool = False) -> Path:
    base = folder if strip else folder.parent
    with zipfile.ZipFile(target, "w") as file:
        for path in [folder, *sorted(folder.rglob("*"))]:
            if path != base:
                file.write(path, path.relative_to(base).as_posix())
    return target


@pytest.fixture
def tiny(tmp_path) -> Path:
    return write_tiny(tmp_path)


def test_tiny_imagenet_as_folder_and_as_zip(tiny, tmp_path):
    (tmp_path / "zips").mkdir()
    zipped(tiny, tmp_path / "zips" / "tiny-imagenet-200.zip")
    bare = zipped(tiny, tmp_path / "bare.zip", strip=True)
    roots = [tiny, tmp_path, tmp_path / "zips" / "tiny-imagenet-200.zip", tmp_path / "zips", bare]
    for root in roots:
        train = create_dataset("tiny_imagenet", str(root), "train")
        validation = create_dataset("Tiny_ImageNet", str(root), "validation")
        assert (len(train), len(validation)) == (12, 5)
        assert class_names(train) == sorted(WNIDS)
        assert validation.targets == [2, 0, 1, 2, 0]  # n03 n01 n02 n03 n01
        for dataset in (train, validation):
            for image, target in dataset:
                level = 60 * WNIDS.index(sorted(WNIDS)[target])
                assert (image.mode, image.size) == ("RGB", (64, 64))
                assert abs(float(np.asarray(image).mean()) - level) < 5
    assert train.words == {wnid: f"word of {wnid}, other word" for wnid in WNIDS}


def test_a_zip_is_read_by_several_workers(tiny, tmp_path, monkeypatch):
    path = zipped(tiny, tmp_path / "x.zip")
    dataset = TinyImageNet(path, is_train=True)
    dataset.transform = np.array  # torch wants to write
    expected = [float(dataset[index][0].mean()) for index in range(12)]
    loader = DataLoader(dataset, batch_size=2, num_workers=2)
    means = torch.cat([images.float().mean((1, 2, 3)) for images, _ in loader])
    assert torch.allclose(means, torch.tensor(expected), atol=1e-3)
    assert pickle.loads(pickle.dumps(dataset))[0][1] == dataset[0][1]
    opened = dataset.files._zip
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert dataset[0][1] == dataset.targets[0]
    assert dataset.files._zip is not opened, "two processes would share the place in one file"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("empty", "expected tiny-imagenet-200.zip, or its content: wnids.txt, words.txt, train/"),
        ("empty", "found notes.txt (tiny-imagenet-200.zip has to be downloaded by hand (http"),
        ("reshuffled", "found no val/val_annotations.txt, but test, train, val, wnids.txt"),
        ("unknown class", "expected train/n07 to be one of the ids in wnids.txt"),
        ("no images", "expected images of every id in wnids.txt; 1 have none, such as train/n02/i"),
        ("no such file", "of 5, 1 are not there, such as val/images/val_2.JPEG"),
        ("commas", "separated by a tab, in each line; a line is 'val_0.JPEG,n01'"),
        ("broken zip", "tiny_imagenet needs a whole zip; "),
        ("broken image", "images must be readable; got "),
    ],
)
def test_a_wrong_layout_says_what_was_expected_and_found(tiny, tmp_path, damage, expected):
    root, split = tiny, "validation"
    if damage == "empty":
        root = tmp_path / "else"
        root.mkdir()
        (root / "notes.txt").write_text("x")
    elif damage == "reshuffled":
        (tiny / "val" / "val_annotations.txt").unlink()
        (tiny / "words.txt").unlink()
    elif damage == "unknown class":
        shutil.copytree(tiny / "train" / "n01", tiny / "train" / "n07")
        split = "train"
    elif damage == "no images":
        shutil.rmtree(tiny / "train" / "n02")
        split = "train"
    elif damage == "no such file":
        (tiny / "val" / "images" / "val_2.JPEG").unlink()
    elif damage == "commas":
        (tiny / "val" / "val_annotations.txt").write_text("val_0.JPEG,n01\n")
    elif damage == "broken zip":
        root = tmp_path / "x.zip"
        root.write_bytes(b"PK no zip")
    elif damage == "broken image":
        (tiny / "val" / "images" / "val_0.JPEG").write_bytes(b"hello")
    with pytest.raises(UserError) as raised:
        create_dataset("tiny_imagenet", str(root), split)[0]
    assert expected in str(raised.value) and "\n" not in str(raised.value)


def test_what_cannot_be_downloaded_or_chosen(tiny, tmp_path):
    gone = str(tmp_path / "gone")
    message = error_of("tiny_imagenet", gone, download=True)
    assert "cannot be downloaded by --dataset-download: tiny-imagenet-200.zip has to" in message
    assert error_of("tiny_imagenet", gone) == f"data folder must exist; got {gone}"
    assert "no labels: use validation; got test" in error_of("tiny_imagenet", str(tiny), "test")
    assert "layout of Tiny ImageNet (--dataset tiny_imagenet)" in error_of("", str(tiny))
    assert len(create_dataset("tiny_imagenet", str(tiny), download=True)) == 12


def test_shares_are_balanced_nested_and_seeded():
    targets = np.random.default_rng(0).permutation(np.repeat(range(5), [100, 100, 50, 10, 3]))
    chosen = {
        (share, seed): set(balanced_indices(targets.tolist(), share, seed).tolist())
        for share in (0.1, 0.2, 0.5, 1.0)
        for seed in (0, 1)
    }
    for (share, seed), indices in chosen.items():
        counts = np.bincount(targets[sorted(indices)], minlength=5)
        expected = [max(1, int(share * n + 0.5)) for n in (100, 100, 50, 10, 3)]
        assert counts.tolist() == expected
        assert indices <= chosen[1.0, seed]
    for seed in (0, 1):
        assert chosen[0.1, seed] < chosen[0.2, seed] < chosen[0.5, seed]
    assert len(chosen[0.1, 0] & chosen[0.1, 1]) < 10  # 26 each, about 3 in common by chance
    again = balanced_indices(targets.tolist(), 0.2, 0)
    assert again.tolist() == sorted(chosen[0.2, 0])


def test_a_share_of_any_data_set(tiny, tmp_path):
    write_images(tmp_path / "images", train=10)
    for name, root, size in (
        ("digits", None, 144),
        ("", tmp_path / "images", 2),
        ("torch/folder", tmp_path / "images", 2),
        ("tiny_imagenet", tiny, 3),
    ):
        full = create_dataset(name, root and str(root), "train")
        part = create_dataset(name, root and str(root), "train", share=0.1, share_seed=5, shift=1)
        # 10 % of each class, rounded by class
        counts = np.bincount([target for _, target in part])
        assert len(part) == counts.sum() and abs(len(part) - size) <= 5
        assert counts.max() - counts.min() <= 1
        assert class_indices(full) == [target for _, target in full]
        assert class_names(part) == class_names(full)
        part.transform = lambda image: image.size
        assert isinstance(part[0][0], tuple)


@pytest.mark.parametrize(
    ("share", "seed", "rule"),
    [
        (0.0, 0, "train_fraction must be in (0, 1]; got 0.0"),
        (1.5, 0, "train_fraction must be in (0, 1]; got 1.5"),
        (0.5, -1, "train_fraction_seed must be at least 0; got -1"),
    ],
)
def test_wrong_shares(share, seed, rule):
    assert rule in error_of("digits", share=share, share_seed=seed)


def test_a_share_needs_samples_that_can_be_chosen():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(UserError, match="needs a map-style data set; got Stream"):
        balanced_subset(Stream(), 0.5, 0)
