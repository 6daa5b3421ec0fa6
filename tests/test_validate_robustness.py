"""validate.py --corruptions, --attack and --drop-at-inference, and their mistakes."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from test_validate_cli import DIGITS, SAVED, digits, line_of, make_model, result_of, rows_of
from test_validate_cli import validate as script

from timm_structdrop.evaluation import corrupt, pgd, random_targets

pytest.importorskip("imagecorruptions", reason="imagecorruptions-imaug is not installed")
FACTS = {"samples", "seed", "dataset", "img_size", "checkpoint"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LeNet-5 that reads digits well, at 32 px."""
    path = tmp_path_factory.mktemp("robust") / "lenet.pth.tar"
    saved = {**SAVED, "std": [0.25], "interpolation": "nearest", "dataset": "digits"}
    state = {"arch": "lenet5", "state_dict": make_model(120).state_dict()}
    torch.save({**state, "args": Namespace(**saved)}, path)
    return path


def digits_argv(checkpoint: Path, *more: object) -> list[object]:
    return ["--checkpoint", checkpoint, "-j", 0, "--device", "cpu", *more]


def accuracy(images: torch.Tensor, targets: torch.Tensor) -> float:
    with torch.no_grad():
        return 100 * (make_model(120)(images).argmax(1) == targets).float().mean().item()


def test_corruptions(checkpoint, tmp_path, capsys):
    file, picture = tmp_path / "r.csv", tmp_path / "curves.png"
    names = ["--corruptions", "contrast,gaussian_noise", "--severities", "2,5"]
    argv = digits_argv(checkpoint, *names, "--results-file", file)
    result = result_of(capsys, *argv, "--plot", picture)
    plain = result_of(capsys, *digits_argv(checkpoint))
    rows = result["rows"]
    assert [(row["corruption"], row["severity"]) for row in rows] == [
        ("none", 0),
        ("gaussian_noise", 2),
        ("gaussian_noise", 5),
        ("contrast", 2),
        ("contrast", 5),
    ]
    assert rows[0].items() >= plain.items()
    assert set(rows[0]) >= FACTS
    assert {name: str(value) for name, value in rows[4].items()} == rows_of(file)[4]
    images, targets = digits(False)
    pixels = ((images[:, 0] * 0.25 + 0.5) * 255).round().byte().numpy()
    dark = torch.stack([torch.from_numpy(corrupt(image, "contrast", 5).copy()) for image in pixels])
    expected = accuracy((dark[:, None] / 255 - 0.5) / 0.25, targets)
    assert rows[4]["top1"] == pytest.approx(expected, abs=1e-3)
    assert rows[4]["top1"] < rows[0]["top1"] - 5
    errors = [row["top1_err"] for row in rows[1:]]
    assert result["mean_corruption_error"] == pytest.approx(sum(errors) / 4, abs=1e-3)
    assert result["top1"] == plain["top1"]
    for name in ("curves.png", "curves-top5.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"

    again = result_of(capsys, *argv, "-b", 50, "--baseline-results", file, "--no-prefetcher")
    assert [row["top1"] for row in again["rows"]] == [row["top1"] for row in rows]
    assert again["mce"] == 100
    other = result_of(capsys, *argv, "--seed", "7")
    changed = [row["loss"] != old["loss"] for row, old in zip(other["rows"], rows, strict=True)]
    assert changed == [False, True, True, False, False]


def test_attack(checkpoint, tmp_path, capsys):
    file = tmp_path / "r.json"
    settings = ["--eps", "16/255", "--steps", 3, "--step-size", "0.04", "--targeted", "--seed", 5]
    files = ["--results-file", file, "--results-format", "json"]
    result = result_of(capsys, *digits_argv(checkpoint, "--attack", "pgd", *settings, *files))
    assert json.loads(file.read_text()) == result
    assert set(result) >= FACTS
    images, targets = digits(False)
    wanted = random_targets(targets, 10, torch.Generator().manual_seed(5))
    model = make_model(120)
    attacked = pgd(
        lambda x: model((x - 0.5) / 0.25),
        images * 0.25 + 0.5,
        wanted,
        eps=16 / 255,
        step_size=0.04,
        steps=3,
        targeted=True,
    )
    attacked = (attacked - 0.5) / 0.25
    assert result["error_rate"] == pytest.approx(100 - accuracy(attacked, targets), abs=0.3)
    assert result["success_rate"] == pytest.approx(accuracy(attacked, wanted), abs=0.3)
    assert result["error_rate"] > result["top1_err"] + 5
    assert result["max_change"] == pytest.approx(16 / 255, abs=1e-5)
    untargeted = result_of(capsys, *digits_argv(checkpoint, "--attack", "pgd"))
    assert untargeted["eps"] == pytest.approx(5 / 255)
    assert (untargeted["steps"], untargeted["targeted"]) == (2, False)
    assert untargeted["success_rate"] > 0


def test_drop_at_inference(checkpoint, tmp_path, capsys):
    file = tmp_path / "r.csv"
    drops = [f"block={block},keep={keep}" for block, keep in ((7, 0.9), (3, 0.2), (3, 1))]
    flags = [word for drop in drops for word in ("--drop-at-inference", drop)]
    argv = digits_argv(checkpoint, *flags, "--results-file", file)
    result = result_of(capsys, *argv)
    top1 = [row["top1"] for row in result["rows"]]
    assert top1[0] == top1[3] == result["top1"]
    assert top1[2] < top1[0] - 3
    assert [(row["block_size"], row["keep_prob"]) for row in rows_of(file)] == [
        ("", "1.0"),
        ("7", "0.9"),
        ("3", "0.2"),
        ("3", "1.0"),
    ]
    assert result["dropping"].startswith("DropBlock layers attached at their default places (1)")
    assert result_of(capsys, *argv) == result
    assert result_of(capsys, *argv, "--seed", 1)["rows"][2] != result["rows"][2]


def test_several_models_share_one_file(tmp_path, capsys, monkeypatch):
    (tmp_path / "names").write_text("resnet8\nresnet20\n")
    monkeypatch.setattr(script, "make_model", lambda flags, _: make_model(30))
    argv = ["-m", tmp_path / "names", *DIGITS, "--mean", 0.5, "--std", 0.25]
    flags = ["--in-chans", 1, "--img-size", 32, "--results-file", tmp_path / "r.csv"]
    study = ["--corruptions", "contrast", "--severities", "1"]
    results = result_of(capsys, *argv, *flags, *study)
    assert [len(result["rows"]) for result in results] == [2, 2]
    assert len(rows_of(tmp_path / "r.csv")) == 4
    line = line_of(*argv, *study, "--plot", tmp_path / "c.png")
    assert line == "--plot draws one model; got 2"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--corruptions", "gausian_noise"], "got 'gausian_noise' (nearest: gaussian_noise"),
        (["--corruptions", ""], "--corruptions: corruptions must be all, paper or of gaussian"),
        (["--corruptions", "all", "--severities", "0-5"], "must be 1 to 5, as 1-5 or 1,3,5; got"),
        (["--severities", "1"], "--severities needs --corruptions; it is not given"),
        (["--attack", "fgsm"], "--attack"),
        (["--attack", "pgd", "--eps", "5"], "eps must be in (0, 1], pixel values being in [0, 1]"),
        (["--attack", "pgd", "--eps", "5/0"], "must be a number or a fraction like 5/255; got"),
        (["--attack", "pgd", "--eps", "x"], "must be a number or a fraction like 5/255; got 'x'"),
        (["--attack", "pgd", "--steps", "0"], "--steps must be at least 1; got 0"),
        (["--attack", "pgd", "--step-size", "0"], "step_size must be in (0, 1]"),
        (["--attack", "pgd", "--model-dtype", "float16"], "bfloat16 or float32; got float16"),
        (["--seed", "-1"], "--seed must be at least 0; got -1"),
        (["--targeted"], "--targeted needs --attack; it is not given"),
        (["--drop-at-inference", "7"], "keep=PROBABILITY[,gamma=paper]; got '7'"),
        (["--drop-at-inference", "block=7,keep=0"], "keep must be a probability in (0, 1]; got"),
        (["--corruptions", "fog", "--attack", "pgd"], "one at a time; got --corruptions and --att"),
        (["--corruptions", "fog", "--plot", "gone/c.png"], "--plot must be a .png file in an exi"),
        (["--corruptions", "fog", "--baseline-results", "gone"], "must be an existing file; got"),
    ],
)
def test_mistakes_in_flags(tmp_path, monkeypatch, argv, line):
    monkeypatch.chdir(tmp_path)
    assert line in line_of(*DIGITS, *argv)


def test_a_baseline_of_other_corruptions_and_a_missing_library(tmp_path, monkeypatch):
    text = "model,corruption,severity,top1_err\nm,none,0,5\nm,fog,1,9\n"
    (tmp_path / "b.csv").write_text(text)
    study = ["--corruptions", "contrast", "--baseline-results", tmp_path / "b.csv"]
    line = line_of(*DIGITS, *study, "--severities", "1")  # before the model is built
    assert line.endswith("it has no contrast at severity 1")
    monkeypatch.setitem(sys.modules, "imagecorruptions.corruptions", None)
    line = line_of(*DIGITS, "--corruptions", "fog")
    assert 'pip install "timm-structdrop[robustness]"' in line
