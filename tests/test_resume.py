"""A run that was killed and continued is, to the bit, the run that was not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from script import ROOT, load_script, write_images
from test_checkpoint import assert_same
from test_loop import make_loop
from timm.scheduler import create_scheduler_v2

from timm_structdrop.errors import UserError
from timm_structdrop.training import Position

train = load_script("train")
FLAGS = (
    "--model", "lenet5_dropcluster", "--num-classes", "2", "--in-chans", "1", "--img-size", "32",
    "--batch-size", "8", "--workers", "0", "--device", "cpu", "--seed", "3", "--epochs", "4",
    "--opt", "adamw", "--lr", "0.003", "--sched", "cosine", "--sched-on-updates",
    "--warmup-epochs", "1", "--drop", "0.2", "--drop-block", "0.4", "--drop-schedule", "linear",
    "--cluster-start", "1", "--cluster-every", "2", "--model-ema", "--model-ema-decay", "0.9",
    "--mixup", "0.2", "--reprob", "0.3", "--shift", "1", "--rotation", "10",
    "--grad-accum-steps", "2", "--checkpoint-hist", "2", "--recovery-interval", "1",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images) -> Path:
    """The folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    train.main([*FLAGS, "--data-dir", str(images), "--output", str(output), "--experiment", "run"])
    return output / "run"


def content(folder: Path, name: str = "last") -> dict:
    saved = torch.load(folder / f"{name}.pth.tar", weights_only=True)
    for flag in ("output", "experiment", "resume"):
        saved["args"].pop(flag)
    return saved


def assert_same_run(folder: Path, whole: Path) -> None:
    """The same weights, averages, optimizer, clusters, best metric, files and rows."""
    assert {file.name for file in folder.iterdir()} == {file.name for file in whole.iterdir()}
    for name in ("last", "model_best"):
        assert_same(content(folder, name), content(whole, name))
    assert (folder / "summary.csv").read_bytes() == (whole / "summary.csv").read_bytes()


def first_column(folder: Path) -> list[str]:
    return [line.split(",")[0] for line in (folder / "summary.csv").read_text().splitlines()]


def kill_when(there: str, folder: Path, *flags: str) -> None:
    """Train in another process until a file named like ``there`` appears, then SIGKILL."""
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob(there)):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline, "the run is not getting there"
        time.sleep(0.002)
    process.kill()
    process.communicate()


def test_killed_twice_and_continued_it_is_the_same_run(tmp_path, images, whole):
    """Killed in the middle of epoch 1, after its cluster fit, and in the middle of epoch 3."""
    folder = tmp_path / "run"
    output = ["--output", str(tmp_path), "--experiment", "run"]
    kill_when("recovery-1-4.pth.tar", folder, *FLAGS, "--data-dir", str(images), *output)
    assert not (folder / "recovery-2-2.pth.tar").exists(), "killed too late to test anything"
    kill_when("recovery-3-2.pth.tar", folder, "--resume", str(folder))
    train.main(["--resume", str(folder)])
    assert_same_run(folder, whole)
    assert (folder / "summary.csv").read_text().count("epoch") == 1
    assert int(content(folder)["state_dict"]["act1.dropcluster.fitted_at"]) == 3


def test_continuing_from_an_older_checkpoint_redoes_the_later_epochs(tmp_path, images, whole):
    output = ["--output", str(tmp_path), "--experiment", "run", "--data-dir", str(images)]
    train.main([*FLAGS, *output, "--checkpoint-hist", "9"])
    folder = tmp_path / "run"
    train.main(["--resume", str(folder / "checkpoint-1.pth.tar")])
    assert (folder / "summary.csv").read_bytes() == (whole / "summary.csv").read_bytes()
    for key in ("state_dict", "state_dict_ema", "optimizer", "metric"):
        assert_same(content(folder)[key], content(whole)[key], key)


def test_the_number_of_workers_changes_nothing(tmp_path, images, whole):
    output = ["--output", str(tmp_path), "--experiment", "run", "--data-dir", str(images)]
    train.main([*FLAGS, *output, "--epochs", "1", "--workers", "2"])
    one_epoch = (whole / "summary.csv").read_text().splitlines()[1].split(",")
    row = (tmp_path / "run" / "summary.csv").read_text().splitlines()[1].split(",")
    assert row[:3] == one_epoch[:3]


def test_a_longer_run_can_be_made_of_a_finished_one(tmp_path, images):
    output = ["--output", str(tmp_path), "--experiment", "run", "--data-dir", str(images)]
    train.main([*FLAGS, *output, "--epochs", "1"])
    train.main(["--resume", str(tmp_path / "run"), "--epochs", "2"])
    assert first_column(tmp_path / "run") == ["epoch", "0", "1"]


def test_into_another_folder(tmp_path, images, whole):
    elsewhere = ["--output", str(tmp_path), "--experiment", "elsewhere"]
    train.main(["--resume", str(whole / "last.pth.tar"), *elsewhere, "--epochs", "5"])
    assert first_column(tmp_path / "elsewhere") == ["epoch", "4"]
    assert (tmp_path / "elsewhere" / "model_best.pth.tar").is_file()


@pytest.mark.parametrize(("on_updates", "share"), [(False, 2 / 3), (True, 11 / 15)])
def test_the_learning_rate_is_that_of_the_flags_at_the_position(on_updates, share):
    """Not that of the checkpoint: epoch 2 of 3, or update 11 of 15, of a polynomial decay."""
    loop = make_loop()
    loop.run.scheduler, _ = create_scheduler_v2(
        loop.run.optimizer,
        "poly",
        num_epochs=3,
        decay_rate=1.0,
        step_on_epochs=not on_updates,
        updates_per_epoch=5,
    )
    loop.run.optimizer.param_groups[0]["lr"] = 99.0
    train.set_learning_rate(loop, Position(epoch=2, batch=1))
    assert loop.run.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * (1 - share))


def test_with_another_model_it_is_an_error_that_names_both(images, whole):
    before = {file.name: file.read_bytes() for file in whole.iterdir()}
    with pytest.raises(UserError, match=r"lenet5_dropblock;.* lenet5_dropcluster"):
        train.main(["--resume", str(whole), "--model", "lenet5_dropblock", "--drop-block", "0.1"])
    assert {file.name: file.read_bytes() for file in whole.iterdir()} == before
