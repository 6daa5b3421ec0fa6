"""train.py as its users call it: outputs, sources of settings, and what they can get wrong."""

import csv
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from script import ROOT, load_script, write_images

from timm_structdrop.errors import UserError
from timm_structdrop.recipes import (
    load_recipe,
    parse_structdrop,
    parse_with_sources,
    recipe_names,
    train_parser,
)
from timm_structdrop.recipes.build import build_scheduler
from timm_structdrop.recipes.packaged import FACTS

train = load_script("train")
SMALL = ("--in-chans", "1", "--img-size", "32", "--batch-size", "16", "--workers", "0",
         "--num-classes", "2", "--opt", "adamw", "--lr", "0.003", "--warmup-epochs", "0",
         "--device", "cpu", "--hflip", "0", "--color-jitter", "0", "--shift", "1")  # fmt: skip
DIGITS = ("--dataset", "digits", "--workers", "0", "--in-chans", "1")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path, images):
    """Trains with these flags; returns the output folder."""

    def train_with(*flags: str, name: str = "run") -> Path:
        output = ["--output", str(tmp_path), "--experiment", name]
        train.main([*SMALL, "--data-dir", str(images), *output, *flags])
        return tmp_path / name

    return train_with


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_what_timms_users_know(run, capsys, caplog):
    caplog.set_level(logging.INFO, "timm_structdrop")
    folder = run(
        "--model", "lenet5_dropcluster", "--epochs", "2", "--cluster-start", "1",
        "--cluster-every", "1", "--drop-schedule", "linear", "--drop-block", "0.2", "--model-ema",
        "--model-ema-decay", "0.5", "--checkpoint-hist", "1",
    )  # fmt: skip
    found = {file.name for file in folder.iterdir()}
    (best,) = (name for name in found if name.startswith("checkpoint-"))
    assert found - {best} == {"args.yaml", "summary.csv", "last.pth.tar", "model_best.pth.tar"}
    first, second = rows(folder)
    assert list(first) == [
        "epoch", "train_loss", "train_top1", "eval_loss", "eval_top1", "eval_top5", "lr",
        "drop_prob", "clusters_fitted_at", "unstructured_channels",
    ]  # fmt: skip
    assert (first["clusters_fitted_at"], second["clusters_fitted_at"]) == ("", "1")
    assert float(first["drop_prob"]) == pytest.approx(0.2 * 2 / 6)
    assert float(second["drop_prob"]) == pytest.approx(0.2 * 5 / 6)
    assert float(second["lr"]) < float(first["lr"]) == 0.003
    settings = yaml.safe_load((folder / "args.yaml").read_text())
    assert settings["model"] == "lenet5_dropcluster" and settings["drop_block"] == 0.2
    printed = capsys.readouterr()
    results = json.loads(printed.out.split("--result\n")[1])
    assert {result["epoch"] for result in results} == {0, 1}
    best_top1 = max(float(row["eval_top1"]) for row in (first, second))
    assert results[-1]["validation"]["top1"] == best_top1
    assert "Train 2/2  [3/3]" in printed.err and "images/s" in printed.err
    assert "Clusters of act1.dropcluster fitted in epoch 2/2: 15 in each of 6" in caplog.text
    next_command = caplog.text.split("Next: ")[1]
    assert f"--checkpoint {folder / 'model_best.pth.tar'}" in next_command
    saved = torch.load(folder / "last.pth.tar", weights_only=True)
    assert (
        saved["arch"] == "lenet5_dropcluster"
        and int(saved["state_dict"]["act1.dropcluster.fitted_at"]) == 1
    )


def test_mixup_clipping_ema_and_channels_last_run(run):
    folder = run(
        "--model", "lenet5_dropblock", "--epochs", "1", "--mixup", "0.2", "--cutmix",
        "1", "--clip-grad", "1", "--channels-last", "--amp", "--amp-dtype", "bfloat16",
        "--val-split", "", "--reprob", "0.5", "--model-ema",
    )  # fmt: skip
    (row,) = rows(folder)
    assert 0 < float(row["train_loss"]) < 10 and "eval_top1" not in row


def test_without_an_evaluation_the_lowest_training_loss_is_the_best(run, caplog, capsys):
    caplog.set_level(logging.INFO, "timm_structdrop")
    flags = ("--model", "lenet5", "--epochs", "4", "--val-split", "", "--checkpoint-hist", "2")
    folder = run(*flags)
    losses = [float(row["train_loss"]) for row in rows(folder)]
    assert losses[0] > min(losses), "the loss has to fall to test anything"
    ranked = sorted(range(4), key=losses.__getitem__)
    kept = {file.name for file in folder.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{epoch}.pth.tar" for epoch in ranked[:2]}
    best = torch.load(folder / "model_best.pth.tar", weights_only=True)
    assert best["epoch"] == ranked[0]
    words = f"{losses[ranked[0]]:.4f}, training loss (epoch {ranked[0] + 1}/4)"
    assert f"*** Best metric: {words}" in caplog.text
    results = json.loads(capsys.readouterr().out.split("--result\n")[1])
    assert [result["epoch"] for result in results] == ranked[::-1]


@pytest.mark.parametrize("flags, best", [((), 0), (("--val-split", ""), 1)])
def test_figures_of_another_kind_do_not_rank_against_each_other(run, flags, best):
    folder = run("--model", "lenet5", "--epochs", "1", "--eval-metric", "loss")
    saved = torch.load(folder / "last.pth.tar", weights_only=True)
    saved["saver"]["best_metric"] = 1e-9  # no loss to come is as low
    torch.save(saved, folder / "last.pth.tar")
    train.main(["--resume", str(folder), "--epochs", "2", *flags])
    assert torch.load(folder / "model_best.pth.tar", weights_only=True)["epoch"] == best


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "flags, mode",
    [
        ([], "max"),
        (["--eval-metric", "loss"], "min"),
        (["--val-split", ""], "min"),
        (["--val-split", "", "--eval-metric", "top5"], "min"),
    ],
)
def test_a_plateau_is_one_of_what_ranks_the_checkpoints(flags, mode):
    parsed = train_parser().parse_flags(["--sched", "plateau", *flags])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler, _ = build_scheduler(parsed, optimizer, updates_per_epoch=3)
    assert scheduler.lr_scheduler.mode == mode


def test_structdrop_attaches_to_any_model(run):
    folder = run(
        "--model", "test_resnet", "--epochs", "1",
        "--structdrop", "dropblock:block_size=3,drop_prob=0.25,modules=['layer3']",
    )  # fmt: skip
    # DropBlock's linear schedule is its default: the last update is not yet at the target
    rate = float(rows(folder)[0]["drop_prob"])
    assert 0 < rate < 0.25
    constant = run(
        "--model", "test_resnet", "--epochs", "1", "--drop-schedule", "constant",
        "--structdrop", "dropblock:block_size=3,drop_prob=0.25,modules=['layer3']",
        name="constant",
    )  # fmt: skip
    assert float(rows(constant)[0]["drop_prob"]) == 0.25


@pytest.mark.parametrize("shape", ["inverse", "v"])
def test_camdrops_schedules_move_its_rate_over_the_run(run, shape):
    """gamma = 1 - rate: from its target to 1 (inverse); to 1 half-way and back (v)."""
    folder = run(
        "--model", "lenet5_camdrop", "--epochs", "4", "--drop-block", "0.2", "--drop-schedule",
        shape, "--val-split", "",
    )  # fmt: skip
    rates = [float(row["drop_prob"]) for row in rows(folder)]
    # rows hold the rate of an epoch's last update; 48 images in batches of 16 are 3 updates
    part = [(3 * epoch + 2) / 12 for epoch in range(4)]
    wanted = {"inverse": [1 - t for t in part], "v": [abs(1 - 2 * t) for t in part]}
    assert rates == pytest.approx([0.2 * factor for factor in wanted[shape]])


def test_the_mutual_loss_has_the_temperature_and_weight_of_the_flags(run):
    flags = ("--model", "lenet5_rblock", "--epochs", "1", "--val-split", "")
    (row,) = rows(run(*flags, "--rblock-temperature", "2", "--rblock-alpha", "0.4"))
    ce, kl, loss = (float(row[f"train_{name}"]) for name in ("ce", "kl", "loss"))
    assert loss == pytest.approx(0.6 * ce + 0.4 * 2**2 * kl, rel=1e-4) and kl > 0
    (row,) = rows(run(*flags, name="papers"))
    ce, kl, loss = (float(row[f"train_{name}"]) for name in ("ce", "kl", "loss"))
    assert loss == pytest.approx(0.9 * ce + 0.1 * 3**2 * kl, rel=1e-4)


def test_later_sources_override_earlier_ones(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("recipe: digits-quickstart\nepochs: 7\nlr: 1e-3\nshift: 2\n")
    recipe = load_recipe("digits-quickstart")
    flags = parse_with_sources(train_parser(), ["-c", str(config), "--shift", "3"])
    assert (flags.shift, flags.epochs, flags.lr) == (3, 7, 0.001)
    assert flags.model == recipe["model"] and flags.epochs != recipe["epochs"]
    assert flags.mixup == train_parser().parse_flags([]).mixup


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_flags_of_the_right_type(name):
    recipe = load_recipe(name)
    assert recipe["description"]
    flags = vars(parse_with_sources(train_parser(), ["--recipe", name]))
    for key, value in recipe.items():
        if key not in FACTS:
            assert flags[key] == value, key


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("epoch: 3", r"unknown key 'epoch' in config .*\(nearest: epochs"),
        ("epochs: many", "epochs in config .* must be a whole number; got 'many'"),
        ("epochs: 1.5", "epochs in config .* must be a whole number; got '1.5'"),
        ("amp: 1", "amp in config .* must be true or false; got 1"),
        ("hflip: 2", r"hflip in config .* must be in \[0, 1\]; got 2"),
        ("sched: cosin", "sched in config .* must be one of cosine"),
        ("scale: 0.5", "scale in config .* must be a list; got 0.5"),
        ("input_size: [3, 32]", r"input_size in config .* must be a list of 3; got \[3, 32\]"),
        ("structdrop: dropblock", "structdrop in config .* must be a list"),
        ("model_kwargs: [a]", "model_kwargs in config .* must be a mapping"),
        ("lr: [1]", "lr in config .* must be one float"),
        ("- a\n- b", "config .* must be a mapping of flags"),
        ("a: [", "config .* must be valid YAML"),
    ],
)
def test_wrong_values_in_files_state_the_rule(tmp_path, text, line):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(UserError, match=line):
        parse_with_sources(train_parser(), ["--config", str(config)])


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--model", "lenet5_dropclutser"], "unknown model .*nearest: lenet5_dropcluster"),
        (["--model", "lenet5", "--dataset", "digit"], "unknown dataset .*nearest: digits"),
        (["--recipe", "digits-quick"], "unknown recipe .*nearest: digits-quickstart"),
        (["--drop-schdule", "linear"], "unknown flag --drop-schdule.*nearest: --drop-schedule"),
        (["--drop-schedule", "linaer"], "got 'linaer' .nearest: linear"),
        (["--epochs", "x"], "must be a whole number; got 'x'"),
        (["--epochs", "0"], "--epochs must be at least 1; got 0"),
        (["--smoothing", "1.5"], r"--smoothing must be in \[0, 1\]; got 1.5"),
        (["--lr", "nan"], r"--lr must be at least 0.0; got nan"),
        (["--config", "missing.yaml"], "config must be an existing YAML file"),
        (["--device", "gpu"], "--device must be one that torch knows; got 'gpu'"),
        (["--model", "lenet5", "--opt", "adamx"], "unknown optimizer .*nearest: adam"),
        (["--model", "lenet5", "--opt-kwargs", "speed=3"], "optimizer sgd does not take"),
        (["--model", "lenet5", "--model-kwargs", "depth=3"], "must be settings of lenet5; got"),
        (["--model", "lenet5", "--num-classes", "3"], "10 classes of the data"),
        (["--model", "lenet5", "--batch-size", "5000"], "1437 training images"),
        (["--model", "lenet5", "--drop-schedule", "linear"], "structured layers"),
        (["--model", "lenet5", "--mixup", "1", "--batch-size", "31"], "even --batch-size"),
        (["--model", "lenet5", "--mean", "0.5", "0.5"], "--mean must be one value or 1; got 2"),
        (["--model", "lenet5", "--train-interpolation", "bicubi"], "nearest: bicubic"),
        (["--model", "lenet5", "--aa", "rnd-m9"], "augmentation flags"),
        (["--model", "lenet5", "--train-crop-mode", "centre"], "augmentation flags"),
        (["--model", "lenet5", "--torchcompile", "inductr"], "nearest: inductor"),
        (["--model", "lenet5", "--resume", "missing"], "existing checkpoint or folder"),
        (["--model", "lenet5", "--resume", __file__, "--data-dir", "none", "--dataset", ""],
         "must be a whole torch or safetensors file"),
        (["--model", "lenet5", "--structdrop", "dropblock:7"], "name:key=value"),
        (["--model", "lenet5", "--structdrop", "dropblok"], "nearest: dropblock"),
        (["--model", "lenet5_dropcluster", "--model-kwargs", "n_clusters=2000"], "got 2000"),
        (["--model", "lenet5_dropcluster", "--drop-block", "1"], r"must be in \[0, 1\); got 1"),
        (["--model", "lenet5", "--train-fraction", "0"], r"-fraction must be in \(0, 1\]; got 0"),
        (["--model", "lenet5_rblock", "--rblock-alpha", "1.5"], r"\[0, 1\]; got 1.5"),
        (["--model", "lenet5_rblock", "--rblock-temperature", "0"], "must be above 0; got 0"),
        (["--model", "lenet5_dropcluster", "--drop-schedule", "linear",
          "--drop-schedule-start", "900"], "start_update must be"),
        (["--model", "lenet5", "--dataset", "", "--data-dir", "none"], "must exist; got none"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_leaves_no_folder(tmp_path, flags, line):
    base = list(DIGITS) if "--config" not in flags and "--recipe" not in flags else []
    with pytest.raises(UserError, match=line) as error:
        train.main([*base, "--output", str(tmp_path / "out"), *flags])
    assert "\n" not in str(error.value).strip()
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_with_its_step(run):
    with pytest.raises(
        UserError, match=r"loss must be finite; got (nan|inf) in epoch 1/1, batch \d/3 "
    ):
        run("--model", "lenet5", "--epochs", "1", "--opt", "sgd", "--lr", "1e30",
            "--sched", "none")  # fmt: skip


def test_a_folder_that_holds_a_run_is_not_overwritten(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pth.tar").write_bytes(b"")
    with pytest.raises(UserError, match="holds a run"):
        run("--model", "lenet5", "--epochs", "1")


def test_an_output_that_is_a_file_is_an_error(run, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="run"):
        run("--model", "lenet5", "--epochs", "1")


def test_from_the_shell_it_is_one_line_on_stderr_and_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--recipe", "digits-quikstart"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    line = "error: unknown recipe 'digits-quikstart' (nearest: digits-quickstart"
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_args_of_timms_own_runs_are_taken_as_far_as_they_are_flags_here(tmp_path):
    (tmp_path / "args.yaml").write_text("epochs: 7\nlog_wandb: false\noutput: elsewhere\n")
    flags = parse_with_sources(train_parser(), ["--resume", str(tmp_path / "last.pth.tar")])
    assert (flags.epochs, flags.output) == (7, "")


def test_structdrop_values_are_literals_or_text():
    name, settings = parse_structdrop("dropblock:stages=(3,4),block_size=7,gamma=exact,x=[1, 2]")
    assert name == "dropblock"
    assert settings == {"stages": (3, 4), "block_size": 7, "gamma": "exact", "x": [1, 2]}
    assert parse_structdrop("dropcluster") == ("dropcluster", {})


def test_the_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_parser().parse_flags(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(action in printed for action in ("--drop-schedule", "--cluster-start", "--recipe"))


@pytest.mark.parametrize("flags", [("lenet5", "--img-size", "24"), ("resnet8", "--in-chans", "1")])
def test_the_images_have_the_channels_and_the_size_of_the_model(flags, tmp_path):
    """timm takes three channels for granted with --img-size, and forgets --in-chans without it."""
    train.main(
        ["--dataset", "digits", "--workers", "0", "--epochs", "1", "--warmup-epochs", "0",
         "--num-classes", "10", "--device", "cpu", "--output", str(tmp_path), "--model", *flags]
    )  # fmt: skip
    assert list(tmp_path.glob("*/last.pth.tar"))


def test_a_run_that_does_nothing_but_warm_up_says_so(run, caplog):
    run("--model", "lenet5", "--epochs", "1", "--warmup-epochs", "5")
    assert "not do more than warm up: --warmup-epochs is 5 in a run of 1 epoch" in caplog.text
    caplog.clear()
    run("--model", "lenet5", "--epochs", "2", "--warmup-epochs", "1", "--experiment", "other")
    assert "warm up" not in caplog.text


def test_a_run_that_ends_before_the_first_fit_of_clusters_says_so(run, caplog):
    run("--model", "lenet5_dropcluster", "--epochs", "2", "--cluster-start", "2")
    assert "its first fit comes after 2 epochs (--cluster-start), and the run has 2" in caplog.text
    caplog.clear()
    run("--model", "lenet5_dropcluster", "--epochs", "2", "--cluster-start", "1", name="fits")
    assert "first fit comes" not in caplog.text


def test_what_a_beginner_forgets_is_said(tmp_path, caplog):
    """A folder without splits, fewer classes than outputs, and going on with a finished run."""
    folder = write_images(tmp_path / "images") / "train"
    caplog.set_level(logging.INFO, "timm_structdrop")
    flags = ["--model", "lenet5", "--data-dir", str(folder), "--batch-size", "8", "--workers", "0"]
    where = ["--output", str(tmp_path), "--experiment", "run", "--epochs", "1", "--device", "cpu"]
    train.main([*flags, *where, "--warmup-epochs", "0", "--lr", "0.01"])
    assert "The model has 10 outputs, the data have 2 classes: --num-classes 2" in caplog.text
    assert "has no folders train/ and validation/: every image is trained on" in caplog.text
    assert "input 1 x 32 x 32 (channels, height, width)" in caplog.text
    assert "1 epoch of 6 batches" in caplog.text and "learning rate 0.01" in caplog.text
    assert "validation top1 (epoch 1/1)" in caplog.text
    caplog.clear()
    train.main(["--resume", str(tmp_path / "run")])
    assert "The run has its 1 epoch already" in caplog.text
    train.main(["--resume", str(tmp_path / "run"), "--epochs", "2", "--lr", "0.02"])
    assert "learning rate 0.02" in caplog.text


def test_a_rate_is_refused_for_a_model_without_a_regularizer(run):
    with pytest.raises(UserError, match=r"--drop-block must be 0 .* for resnet8 \(resnet8_"):
        run("--model", "resnet8", "--drop-block", "0.1")
    run("--model", "resnet8", "--drop-block", "0", "--epochs", "1")
