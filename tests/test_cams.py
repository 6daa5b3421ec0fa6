"""Class activation maps: against the equation by hand, their measures, and `inspect --cams`."""

import csv
import json
import math
from functools import partial

import pytest
import timm
import torch
from test_analysis import overlaps
from torch import nn

from timm_structdrop.__main__ import main
from timm_structdrop.analysis import (
    Cams,
    cam_place,
    class_activation_maps,
    compare_spread,
    draw_cams,
)
from timm_structdrop.errors import UserError, run_command

DIGITS = ["--dataset", "digits", "--num-images", "24"]


def build(name="resnet8", **settings):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, in_chans=3, **settings)
    nn.init.normal_(model.fc.weight)
    return model.eval(), torch.randn(7, 3, 16, 24), torch.arange(7) % 5


def cams_of(maps, target=None, name="layer3"):
    maps = torch.as_tensor(maps, dtype=torch.float32)
    target = torch.zeros(len(maps), dtype=torch.int64) if target is None else target
    return Cams(name, maps, target, torch.zeros(len(maps), dtype=torch.int64))


@pytest.mark.parametrize(("layer", "group"), [("layer3", 1), ("layer2.0.act1", 2), ("act1", 4)])
def test_maps_are_those_of_the_equation(layer, group):
    """Eq. (7): each channel has the sum of its group of the classifier's weights."""
    model, images, target = build()
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, o: seen.append(o))
    logits = model(images).detach()
    handle.remove()
    cams = class_activation_maps(model, images, target, cam_place(model, (16, 24), layer), 3)
    features, weight = seen[0].detach(), model.fc.weight.detach()
    for b in range(7):
        expected = torch.zeros(features.shape[2:])
        for c in range(features.shape[1]):
            alpha = sum(weight[target[b], c * group + j] for j in range(group))
            expected += alpha * features[b, c]
        torch.testing.assert_close(cams.maps[b], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(cams.predicted, logits.argmax(1))


def test_the_mean_of_the_last_map_is_the_score_of_the_class():
    model, images, target = build("resnet8_camdrop")
    cams = class_activation_maps(model, images, target, cam_place(model, (16, 24)))
    assert cams.name == "layer3" and cams.maps.shape == (7, 4, 6)
    score = model(images)[torch.arange(7), target] - model.fc.bias[target]
    torch.testing.assert_close(cams.maps.mean((1, 2)), score.detach(), rtol=1e-4, atol=1e-5)


def test_what_a_regularizer_sees_is_before_it():
    model, images, target = build("resnet8_camdrop", drop_block_rate=0.9)
    plain, _, _ = build()
    plain.load_state_dict(model.state_dict())
    for layer in ("layer3.0.act1", "layer2"):
        both = [
            class_activation_maps(m, images, target, cam_place(m, (16, 24), layer)).maps
            for m in (model, plain)
        ]
        assert torch.equal(*both)


def test_area_is_the_fraction_above_half_the_maximum():
    peak = torch.zeros(4, 5)
    peak[1, 2], peak[0, 0], peak[3, 3] = 2.0, 1.0, 0.99
    maps = torch.stack([peak, torch.ones(4, 5), -torch.ones(4, 5), torch.zeros(4, 5)])
    area = cams_of(maps).area()
    assert area[:2].tolist() == [2 / 20, 1.0]
    assert area[2:].isnan().all()


def test_entropy_is_that_of_the_positive_part():
    uniform, single, half = torch.ones(4, 4), -torch.ones(4, 4), torch.full((4, 4), -3.0)
    single[2, 1] = 7.0
    half[:2] = 0.5
    entropy = cams_of(torch.stack([uniform, single, half, -uniform])).entropy()
    assert entropy[:3].tolist() == pytest.approx([1.0, 0.0, math.log(8) / math.log(16)])
    assert math.isnan(entropy[3])


def test_differences_are_of_the_same_images():
    wide, narrow = torch.ones(4, 4), torch.zeros(4, 4)
    narrow[0, 0] = 1.0
    first = cams_of(torch.stack([narrow, narrow, wide, -wide]))
    second = cams_of(torch.stack([wide, narrow, wide, wide]))
    found = compare_spread(first, second)["area"]
    assert found["n"] == 3 and found["share_more_spread"] == pytest.approx(1 / 3)
    assert found["mean_difference"] == pytest.approx(15 / 16 / 3)
    assert found["standard_error"] == pytest.approx(15 / 16 / 3)  # of (d, 0, 0)
    nothing = compare_spread(cams_of(-wide[None]), cams_of(wide[None]))["area"]
    assert nothing["n"] == 0 and nothing["mean_difference"] is None
    with pytest.raises(UserError, match="different classes"):
        compare_spread(first, cams_of(second.maps, torch.ones(4, dtype=torch.int64)))


def test_the_place_is_the_deepest_stage_that_shows_where():
    model, _, _ = build()
    assert cam_place(model, (16, 24)).name == "layer3"
    assert cam_place(model, (8, 8)).name == "layer2"  # 2x2 behind it
    with pytest.raises(UserError, match=r"smaller at 2x2"):
        cam_place(model, (2, 2))
    with pytest.raises(UserError, match=r"got 'layer4' \(nearest: layer"):
        cam_place(model, (16, 16), "layer4")


def test_bad_targets_and_models():
    model, images, target = build()
    place = cam_place(model, (16, 24))
    with pytest.raises(UserError, match=r"classes in \[0, 4\]"):
        class_activation_maps(model, images, target + 3, place)
    with pytest.raises(UserError, match="with B = 7 and K = 5"):
        class_activation_maps(model, images, target[:3], place)
    model.fc = nn.Identity()
    with pytest.raises(UserError, match="Linear"):
        class_activation_maps(model, images, target, place)


@pytest.mark.parametrize("n", [1, 6])
def test_texts_of_the_picture_do_not_overlap(n):
    model, images, target = build()
    cams = class_activation_maps(model, images, target, cam_place(model, (16, 24)))
    nowhere = cams_of(-torch.ones(7, 4, 6), target)
    names = ["tench", "goldfish", "shark", "ray", "cock"]
    figure = draw_cams(
        images[:n], {"a_rather_long_model_name_camdrop": cams, "resnet8 (2)": nowhere}, names
    )
    assert overlaps(figure) == []


def test_inspect_compares_models_on_the_same_images(tmp_path, capsys):
    runs = {}
    for name in ("lenet5", "lenet5_camdrop"):
        model = timm.create_model(name)
        args = {"model": name, "dataset": "digits", "img_size": 48}
        runs[name] = tmp_path / f"{name}.pth.tar"
        torch.save({"state_dict": model.state_dict(), "arch": name, "args": args}, runs[name])
    out = tmp_path / "out"
    main(
        ["inspect", "lenet5", "--checkpoint", str(runs["lenet5"]), *DIGITS, "--cams", "--compare",
         "lenet5_camdrop", str(runs["lenet5_camdrop"]), "--output", str(out)]
    )  # fmt: skip
    text = capsys.readouterr().out
    assert "lenet5_camdrop  layer2  5x5" in text and " of 24" in text
    found = json.loads((out / "cams.json").read_text())
    assert [model["name"] for model in found["models"]] == ["lenet5", "lenet5_camdrop"]
    assert set(found["more_spread_than_the_first"]) == {"lenet5_camdrop"}
    for number, name in (("", "lenet5"), ("-1", "lenet5_camdrop")):
        rows = list(csv.DictReader((out / f"cams{number}.csv").read_text().splitlines()))
        assert len(rows) == 24
        figures = next(model for model in found["models"] if model["name"] == name)
        areas = [float(row["area"]) for row in rows if row["area"]]
        assert sum(areas) / len(areas) == pytest.approx(figures["area"]["mean"])
    assert (out / "cams.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--compare", "lenet5", "x"], "got no --cams"),
        (["--cams", "--compare", "lenet5", "none.pt"], "existing file or folder; got none.pt"),
        (["--cams", "--cam-layer", "layer9"], "got 'layer9' (nearest: layer"),
        (["--cams", "--num-classes", "4"], "classes in [0, 3]"),
    ],
)
def test_bad_input_is_one_line(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(partial(main, ["inspect", "lenet5", *DIGITS, *argv, "--output", str(tmp_path)]))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert list(tmp_path.iterdir()) == []
