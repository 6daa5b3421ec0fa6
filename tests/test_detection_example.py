"""The detection example: its data, its scores, and that a detector with DropBlock learns."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from examples import detection
from examples._boxes import CLASSES, CocoBoxes, PastedObjects
from examples._detector import PyramidBackbone, measured_drops, retinanet
from examples._scores import average_precision
from timm_structdrop.errors import UserError, one_line
from timm_structdrop.layers import DropBlock2d


def test_objects_are_where_the_boxes_say():
    data = PastedObjects(96, 40, True, seed=3)
    labels = []
    for index in range(40):
        image, target = data[index]
        again, _ = data[index]
        assert torch.equal(image, again)
        assert image.shape == (3, 96, 96)
        assert 0 <= image.min() <= image.max() <= 1
        boxes = target["boxes"]
        assert len(boxes) == len(target["labels"]) >= 1
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] - boxes[:, :2]).min() >= 96 // 4
        assert boxes.max() <= 96
        labels += target["labels"].tolist()
    assert set(labels) == set(range(len(CLASSES)))
    assert not torch.equal(data[0][0], data[1][0])
    assert not torch.equal(data[0][0], PastedObjects(96, 40, True, seed=4)[0][0])
    assert not torch.equal(data[0][0], PastedObjects(96, 40, False, seed=3)[0][0])
    with pytest.raises(UserError, match="at least 48, to hold an object; got 32"):
        PastedObjects(32, 1, True)


def write_coco(root: Path) -> None:
    (root / "val2017").mkdir()
    (root / "annotations").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "val2017" / "7.png")
    found = {
        "images": [{"id": 7, "file_name": "7.png"}, {"id": 8, "file_name": "gone.png"}],
        "categories": [{"id": 44, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"image_id": 7, "bbox": [2, 3, 10, 5], "category_id": 44},
            {"image_id": 7, "bbox": [1, 1, 8, 0.2], "category_id": 3},
            {"image_id": 8, "bbox": [1, 1, 8, 8], "category_id": 3, "iscrowd": 1},
        ],
    }
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(found))


def test_a_folder_of_coco(tmp_path):
    with pytest.raises(UserError, match=r"must hold val2017; got"):
        CocoBoxes(str(tmp_path), False)
    write_coco(tmp_path)
    data = CocoBoxes(str(tmp_path), False)
    assert (len(data), data.classes) == (1, ("dog", "cat"))
    image, target = data[0]
    assert image.shape == (3, 20, 30)
    assert target["boxes"].tolist() == [[2, 3, 12, 8]]
    assert target["labels"].tolist() == [1]
    data.is_train = True
    torch.manual_seed(0)
    mirrored = [sample for sample in (data[0] for _ in range(20)) if not sample[0].equal(image)]
    assert 3 < len(mirrored) < 17
    assert mirrored[0][1]["boxes"].tolist() == [[18, 3, 28, 8]]
    assert torch.equal(mirrored[0][0].flip(2), image)


def boxes(*rows: tuple) -> dict[str, Tensor]:
    """(x1, y1, x2, y2, label, score) rows."""
    values = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    return {"boxes": values[:, :4], "labels": values[:, 4].long(), "scores": values[:, 5]}


def test_average_precision_by_hand():
    truth = [boxes((0, 0, 10, 10, 0, 1), (20, 0, 30, 10, 0, 1)), boxes((0, 0, 10, 10, 1, 1))]
    assert average_precision(truth, truth, 2) == {"ap": 100, "recall": 100, "objects": 3}
    found = [
        # right; the same object again; the other object with an overlap below a half
        boxes((0, 0, 10, 9, 0, 0.9), (0, 0, 10, 10, 0, 0.8), (26, 0, 36, 10, 0, 0.7)),
        boxes((0, 0, 10, 10, 0, 0.95), (0, 1, 10, 11, 1, 0.2)),
    ]
    # class 0, best first: wrong (0.95), right (0.9), wrong, wrong; precision 1/2 at recall 1/2
    scores = average_precision(found, truth, 2)
    assert scores["ap"] == pytest.approx(100 * (0.25 + 1) / 2)
    assert scores["recall"] == pytest.approx(100 * 2 / 3)
    assert average_precision(found, truth, 2, 0.3)["recall"] == pytest.approx(100 * 2 / 3)
    assert average_precision(found, truth, 2, 0.2)["recall"] == 100
    # of the two objects found, one by a box of score 0.2
    assert detection.score(found, truth, 2, False)["recall50"] == pytest.approx(100 / 3, abs=0.01)
    nothing = [boxes(), boxes()]
    assert average_precision(nothing, truth, 2) == {"ap": 0, "recall": 0, "objects": 3}


def test_the_measured_fraction_is_what_was_dropped():
    layer = DropBlock2d(0.25, 3)
    model = torch.nn.Sequential(torch.nn.ReLU(), layer)
    torch.manual_seed(0)
    images = torch.randn(64, 8, 16, 16)
    with measured_drops(model) as dropped:
        model(images)
    assert dropped["1"] == dropped["all"] == pytest.approx(0.25, abs=0.02)
    with measured_drops(model.eval()) as dropped:
        model(images)
    assert dropped["all"] == 0
    assert not layer._forward_hooks


def test_the_pyramid_is_what_torchvision_expects():
    settings = {"features_only": True, "out_indices": (2, 3, 4)}
    features = timm.create_model("resnet18_dropblock", **settings).eval()
    image = torch.randn(1, 3, 64, 96)
    for coarse, extra in ((False, []), (True, [(1, 2), (1, 1)])):
        levels = PyramidBackbone(features, 16, coarse).eval()(image)
        sizes = [tuple(level.shape[2:]) for level in levels.values()]
        assert sizes == [(8, 12), (4, 6), (2, 3), *extra]
        assert all(level.shape[1] == 16 for level in levels.values())
    with pytest.raises(UserError, match=r"its maps are at 1/2, 1/4, 1/8"):
        retinanet_of_strides = timm.create_model(
            "resnet18", features_only=True, out_indices=(0, 1, 2)
        )
        PyramidBackbone(retinanet_of_strides, 16, False)
    with pytest.raises(UserError, match="cannot be the backbone of a pyramid"):
        retinanet("lenet5", 3, img_size=64)
    with pytest.raises(UserError, match="must be a model timm knows; got 'resnet1'"):
        retinanet("resnet1", 3, img_size=64)


def test_it_learns_and_drops(tmp_path, capsys, monkeypatch):
    """A few updates: the loss falls, and DropBlock drops as much as its schedule says."""
    torch.manual_seed(0)
    size = ["--img-size", "64", "--channels", "16", "--batch-size", "4"]
    argv = ["--steps", "20", "--workers", "0", "--device", "cpu", "--keep-prob", "0.8"]
    monkeypatch.setattr(detection, "VALIDATION_IMAGES", 8)
    detection.main([*size, *argv, "--lr", "0.003", "--output", str(tmp_path)])
    figures = json.loads((tmp_path / "detection.json").read_text())
    losses = figures["loss"]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    dropped = figures["dropped"]
    last = [value for name, value in dropped.items() if "layer4" in name]
    before = [value for name, value in dropped.items() if "layer3" in name]
    assert len(last) == len(before) == 6
    # the last two of 20 updates: the rate is at 18.5/20 of 0.2 in group 4, a quarter of it before
    assert np.mean(last) == pytest.approx(0.2 * 18.5 / 20, abs=0.05)
    assert np.mean(before) == pytest.approx(0.2 / 4, abs=0.03)
    assert figures["objects"] >= 8
    assert (tmp_path / "detection.png").read_bytes()[:4] == b"\x89PNG"
    assert "Dropped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--keep-prob", "0"], "--keep-prob must be in (0, 1]; got 0.0"),
        (["--img-size", "64", "64", "64"], "--img-size must be one number or two; got 3"),
        (["--img-size", "32"], "must be at least 48; got 32"),
        (["--coco", "gone"], "a folder of COCO must hold train2017; got gone"),
        (["--step", "3"], "unknown flag --step (nearest: --steps"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, argv, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        detection.main(argv)
    assert line in one_line(raised.value)


def test_settings_of_the_backbone_reach_it():
    flags = Namespace(**vars(detection.parse_flags(["--block-size", "5", "--keep-prob", "0.7"])))
    model = detection.build(flags, 3)
    layers = [module for module in model.modules() if isinstance(module, DropBlock2d)]
    assert {(layer.block_size, round(layer.target_drop_prob, 6)) for layer in layers} == {(5, 0.3)}
