"""validate.py: figures, where settings come from, results files, and one line for each mistake."""

import argparse
import csv
import json
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from script import ROOT, load_script
from torch import nn
from torch.nn.functional import cross_entropy

from timm_structdrop import attach
from timm_structdrop.data import DigitsDataset
from timm_structdrop.errors import UserError, one_line
from timm_structdrop.recipes import load_recipe

DIGITS = ["--dataset", "digits", "-j", "0", "--device", "cpu"]
SAVED = {"model": "lenet5", "num_classes": 10, "in_chans": 1, "img_size": 32, "mean": [0.5]}


validate = load_script("validate")


def digits(is_train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The digits by hand: every pixel four times in both directions, mean 0.5, deviation 0.25."""
    data = DigitsDataset(is_train, "L")
    pixels = torch.tensor(data.images)[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3)
    return (pixels / 255 - 0.5) / 0.25, torch.tensor(data.targets)


@cache
def make_model(steps: int) -> nn.Module:
    """A LeNet-5 that has seen some digits."""
    torch.manual_seed(0)
    model = timm.create_model("lenet5", num_classes=10, in_chans=1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    images, targets = digits(True)
    for batch in torch.randint(len(images), (steps, 32)):
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), targets[batch]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a training run."""
    folder = tmp_path / "run"
    folder.mkdir()
    saved = {
        "arch": "lenet5",
        "args": argparse.Namespace(
            **SAVED, dataset="digits", std=[0.25], interpolation="nearest", gp="avg"
        ),
        "state_dict": make_model(30).state_dict(),
        "state_dict_ema": make_model(45).state_dict(),
    }
    torch.save(saved, folder / "model_best.pth.tar")
    return folder


def result_of(capsys: pytest.CaptureFixture, *argv: object) -> dict:
    validate.main([str(word) for word in argv])
    return json.loads(capsys.readouterr().out.split("--result\n")[1])


def rows_of(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.parametrize(("ema", "steps"), [([], 30), (["--use-ema"], 45)])
def test_figures_of_a_runs_checkpoint(run, capsys, ema, steps):
    result = result_of(capsys, "--checkpoint", run, "-j", 0, "--device", "cpu", *ema)
    images, targets = digits(False)
    with torch.no_grad():
        logits = make_model(steps)(images)
    place = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert result["top1"] == pytest.approx(100 * (place < 1).float().mean().item(), abs=1e-4)
    assert result["top5"] == pytest.approx(100 * (place < 5).float().mean().item(), abs=1e-4)
    assert result["loss"] == pytest.approx(cross_entropy(logits, targets).item(), abs=1e-4)
    assert 20 < result["top1"] < 99.9
    assert result["top1_err"] == pytest.approx(100 - result["top1"])
    columns = ["model", "top1", "top1_err", "top5", "top5_err", "loss", "param_count"]
    assert list(result) == [*columns, "img_size", "crop_pct", "interpolation", "checkpoint"]
    assert (result["model"], result["img_size"], result["param_count"]) == ("lenet5", 32, 0.06)
    assert result["checkpoint"] == str(run / "model_best.pth.tar")


def test_flags_stand_over_config_over_recipe_over_checkpoint(run, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("img_size: 24\nstd: [0.5]\nmodel: lenet5\nlr: 0.3\n")
    argv = ["--checkpoint", str(run), "--recipe", "digits-quickstart", "--config", str(config)]
    flags, checkpoint, decided = validate.parse_validate_flags([*argv, "--std", "0.125"])
    assert (flags.std, flags.img_size, flags.interpolation) == ([0.125], 24, "nearest")
    recipe = load_recipe("digits-quickstart")
    assert (flags.batch_size, flags.num_classes, flags.mean) == (recipe["batch_size"], 10, [0.5])
    assert checkpoint.arch == "lenet5"
    assert decided == {"interpolation": "nearest", "mean": [0.5], "gp": "avg"}
    flags, _, _ = validate.parse_validate_flags(argv[:4])
    assert flags.model == recipe["model"] != "lenet5"
    assert (flags.gp, flags.mean) == (None, [0.5])  # the pool belongs to the checkpoint's model


def test_attached_regularizers_come_from_the_runs_settings(run, tmp_path, capsys):
    model = attach(deepcopy(make_model(30)), "dropcluster", modules=["act1"], img_size=32)
    assert len(model.state_dict()) > len(make_model(30).state_dict())
    saved = {"arch": "lenet5", "state_dict": model.state_dict()}
    args = {**SAVED, "std": [0.25], "interpolation": "nearest"}
    attached = argparse.Namespace(**args, structdrop=["dropcluster:modules=['act1']"])
    torch.save({**saved, "args": attached}, tmp_path / "with.pth.tar")
    result = result_of(capsys, "--checkpoint", tmp_path / "with.pth.tar", *DIGITS)
    plain = result_of(capsys, "--checkpoint", run, *DIGITS)
    assert result["loss"] == plain["loss"]


def test_results_files(run, tmp_path, capsys):
    argv = ["--checkpoint", run, *DIGITS, "--results-file", tmp_path / "r.csv"]
    result = result_of(capsys, *argv)
    (row,) = rows_of(tmp_path / "r.csv")
    assert row == {key: str(value) for key, value in result.items()}
    result_of(capsys, *argv, "--results-format", "json")
    assert json.loads((tmp_path / "r.csv").read_text()) == result
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.csv", "run"]


def test_several_models_best_first_without_those_that_fail(tmp_path, capsys, monkeypatch):
    names = tmp_path / "names.txt"
    names.write_text("resnet8\nlenet5\n\nresnet20\n")

    def pretrained(flags: argparse.Namespace, checkpoint: None) -> nn.Module:
        if flags.model == "lenet5":
            raise UserError("no network")
        return make_model({"resnet8": 0, "resnet20": 45}[flags.model])

    monkeypatch.setattr(validate, "make_model", pretrained)
    argv = ["-m", names, *DIGITS, "--results-file", tmp_path / "r.csv"]
    results = result_of(capsys, *argv)
    assert [row["model"] for row in results] == ["resnet20", "resnet8"]
    assert results[0]["top1"] > results[1]["top1"]
    saved = rows_of(tmp_path / "r.csv")
    assert [row["model"] for row in saved] == [row["model"] for row in results]
    names.write_text("lenet5\nlenet5\n")
    assert line_of(*argv).startswith("none of the 2 models can be evaluated")


def test_names_of_models():
    assert validate.matching_models("test_resnet") is None
    assert validate.matching_models("test_resnet*") == ["test_resnet.r160_in1k"]
    everything = validate.matching_models("all")
    assert "resnet18.a1_in1k" in everything
    assert not any(name.endswith("_in21k") for name in everything)


@pytest.mark.parametrize(
    "extra",
    [["--amp", "--amp-dtype", "bfloat16"], ["--channels-last"], ["--model-dtype", "bfloat16"]],
)
def test_precision_and_layout(run, capsys, extra):
    plain = result_of(capsys, "--checkpoint", run, *DIGITS)
    other = result_of(capsys, "--checkpoint", run, *DIGITS, *extra)
    assert other["loss"] == pytest.approx(plain["loss"], rel=0.02)
    assert (other["loss"] == plain["loss"]) == (extra == ["--channels-last"])


def line_of(*argv: object) -> str:
    with pytest.raises((UserError, OSError)) as raised:
        validate.main([str(word) for word in argv])
    return one_line(raised.value)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--model", "resnet19"], "unknown model 'resnet19' (nearest: resnet"),
        (["--model", "no_such_*"], "must match pretrained models or list them; no_such_* names"),
        (["--model", "lenet5"], "must have pretrained weights or --checkpoint; lenet5 has none"),
        (["--recipe", "digits-quickstat"], "unknown recipe 'digits-quickstat' (nearest: digits-"),
        (["--config", "gone.yaml"], "gone.yaml"),
        (["--batch-sise", "3"], "unknown flag --batch-sise (nearest: --batch-size"),
        (["--batch-size", "0"], "--batch-size must be at least 1; got 0"),
        (["--amp-dtype", "int8"], "int8"),
        (["--amp", "--model-dtype", "float16"], "--amp needs --model-dtype float32; got float16"),
        (["--interpolation", "bicubik"], "unknown interpolation 'bicubik' (nearest: bicubic"),
        (["--torchcompile", "inducktor"], "torch.compile backend 'inducktor' (nearest: inductor"),
        (["--device", "gpu"], "--device must be one that torch knows; got 'gpu'"),
        (["--device", "cuda:99"], "--device must be available; got 'cuda:99', and torch sees"),
        (["--results-file", "gone/r.csv"], "must be in a writable folder; got gone/r.csv"),
        (["--results-file", "."], "--results-file must be a file; got the folder ."),
        (["--checkpoint", "gone.pth"], "must be an existing file or folder; got gone.pth"),
        (["--checkpoint", "empty"], "must hold model_best or last; empty holds neither"),
        (["--checkpoint", "half.pth"], "must be a whole torch or safetensors file; half.pth ("),
    ],
)
def test_mistakes_in_flags(run, tmp_path, monkeypatch, argv, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    whole = (run / "model_best.pth.tar").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    assert line in line_of(*DIGITS, *argv)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--model", "resnet8"], "must fit the model resnet8; {run} holds lenet5: "),
        (["--num-classes", "3"], "must fit the model lenet5; {run} holds lenet5: 2 of another"),
        (["--dataset", "digit"], "unknown dataset 'digit' (nearest: digits"),
        (["--dataset", "", "--data-dir", "gone"], "data folder must exist; got gone"),
        (["--dataset", ""], "dataset folder needs its folder: --data-dir; got none"),
        (["--split", "validaton"], "unknown split 'validaton' of digits (nearest: validation"),
        (["--mean", "0.5", "0.5"], "--mean must be one value or 1; got 2"),
    ],
)
def test_mistakes_around_a_good_checkpoint(run, argv, line):
    found = line_of("--checkpoint", run, "-j", 0, "--device", "cpu", *argv)
    assert line.format(run=run / "model_best.pth.tar") in found


@pytest.mark.parametrize(
    ("argv", "size"), [([], 32), (["--img-size", "24"], 24), (["--in-chans", "3"], 32)]
)
def test_images_have_the_channels_of_pretrained_weights(capsys, caplog, argv, size):
    caplog.set_level("INFO", "timm_structdrop")
    result = result_of(capsys, "--model", "lenet5_dropcluster.digits", *DIGITS, *argv)
    assert result["img_size"] == size and result["top1"] > 40
    channels = 3 if "--in-chans" in argv else 1
    assert f"of {channels} x {size} x {size} inputs" in caplog.text


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--in-chans", "2"], "must take the 1 channel of L images (--in-chans, --input-img-mode)"),
        (["--in-chans", "4", "--dataset", "", "--data-dir", "."], "of L images"),
        (["--in-chans", "3", "--input-img-mode", "L"], "1 channel of L images"),
        (["--input-img-mode", "grey"], "must be a mode of PIL, such as L, RGB or RGBA; got 'grey'"),
        (["--in-chans", "3", "--mean", "0.5", "0.5"], "--mean must be one value or 3; got 2"),
    ],
)
def test_channels_that_the_images_do_not_have(argv, line):
    assert line in line_of("--model", "lenet5_dropcluster.digits", *DIGITS, *argv)


def test_no_averaged_weights_and_too_few_outputs(tmp_path):
    model = timm.create_model("lenet5", num_classes=3, in_chans=1)
    saved = {"arch": "lenet5", "state_dict": model.state_dict()}
    args = argparse.Namespace(**{**SAVED, "num_classes": 3})
    torch.save({**saved, "args": args}, tmp_path / "x.pth")
    argv = ["--checkpoint", tmp_path / "x.pth", *DIGITS]
    assert "averaged (EMA) weights" in line_of(*argv, "--use-ema")
    assert line_of(*argv).endswith("an output for each of the 10 classes of the data; it has 3")


def test_an_unreadable_image_ends_the_command_in_one_line(run, tmp_path):
    for name in "ab":
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "data" / "val" / name / "good.png")
    bad = tmp_path / "data" / "val" / "b" / "broken.png"
    bad.write_bytes(b"not an image")
    argv = ["--checkpoint", run, "--dataset", "", "--data-dir", tmp_path / "data", "-j", "1"]
    results = ["--device", "cpu", "--results-file", tmp_path / "r.csv"]
    done = subprocess.run(
        [sys.executable, ROOT / "validate.py", *argv, *results],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: images must be readable; got {bad} (cannot identify image")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r.csv").exists()
