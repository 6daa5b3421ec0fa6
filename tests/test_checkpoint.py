"""Checkpoints: which are kept, what they restore, and that no failure leaves half a file."""

import os
import random
import resource
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.scheduler import create_scheduler_v2
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import nn

from timm_structdrop.errors import UserError
from timm_structdrop.training import (
    Position,
    RunSaver,
    RunState,
    SummaryFile,
    find_resume,
    make_task,
    resume,
)


def make_run(arch: str = "tiny", width: int = 3, ema: bool = False, sched: str = "cosine"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    task = make_task(model, verbose=False)
    if ema:
        task.setup_ema(decay=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler, _ = create_scheduler_v2(optimizer, sched=sched, num_epochs=9, warmup_epochs=0)
    return RunState(arch, task, optimizer, scheduler, settings={"model": arch, "lr": 0.1})


def train(run: RunState, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    run.task.train()
    for step in range(steps):
        images = torch.randn(8, 2, generator=generator)
        run.task(images, (images[:, 0] > 0).long())["loss"].backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.task.update_ema(step=step)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def assert_same(a, b, where: str = "") -> None:
    """Equal to the bit, through dicts and lists."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{index}")
    else:
        assert a == b, where


@pytest.mark.parametrize("decreasing", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_same_files_as_timms_saver(tmp_path, decreasing, seed):
    """Oracle: timm's own saver, on metrics with many ties."""
    random.seed(seed)
    run = make_run()
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    saver = RunSaver(run, ours, decreasing, max_history=3)
    timms = CheckpointSaver(
        run.task.trainable_module,
        run.optimizer,
        checkpoint_dir=str(theirs),
        decreasing=decreasing,
        max_history=3,
    )
    for epoch in range(12):
        metric = float(random.randrange(5))
        assert saver.save_checkpoint(epoch, metric) == timms.save_checkpoint(epoch, metric)
        assert names(ours) == names(theirs)
        best = torch.load(ours / "model_best.pth.tar")
        assert best["epoch"] == torch.load(theirs / "model_best.pth.tar")["epoch"]
        assert torch.load(ours / "last.pth.tar")["epoch"] == epoch


def test_without_metrics_the_newest_are_kept(tmp_path):
    saver = RunSaver(make_run(), tmp_path, max_history=2)
    for epoch in range(4):
        saver.save_checkpoint(epoch)
    kept = {"checkpoint-2.pth.tar", "checkpoint-3.pth.tar", "last.pth.tar"}
    assert names(tmp_path) == kept


@pytest.mark.parametrize("sched", ["cosine", "plateau"])
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
def test_everything_comes_back(tmp_path, sched):
    run = make_run(ema=True, sched=sched)
    saver = RunSaver(run, tmp_path, max_history=2)
    train(run, 5)
    for epoch, metric in enumerate([3.0, 1.0, 2.0]):
        run.scheduler.step(epoch + 1, metric)
        saver.save_checkpoint(epoch, metric, update=5 * (epoch + 1))
    fresh = make_run(ema=True, sched=sched)
    train(fresh, 2, seed=1)
    position, content = resume(fresh, find_resume(tmp_path))
    again = RunSaver(fresh, tmp_path, max_history=2)
    again.restore(content, tmp_path / "last.pth.tar")
    fresh.scheduler.step(position.epoch)
    assert position == Position(epoch=3, update=15)
    assert_same(fresh.state(position), run.state(position))
    assert (again.best_metric, again.best_epoch) == (3.0, 0)
    assert again.checkpoint_files == saver.checkpoint_files
    train(run, 3, seed=2)
    train(fresh, 3, seed=2)
    for one in (run, fresh):
        one.scheduler.step(4, 0.5)
    assert_same(fresh.state(position), run.state(position))


def test_recovery_checkpoints_replace_each_other_and_go_with_the_epoch(tmp_path):
    run = make_run()
    saver = RunSaver(run, tmp_path)
    saver.save_checkpoint(8, 1.0)
    saver.save_recovery(9, 2, 20, {"loss": 0.5})
    saver.save_recovery(9, 10, 24, {"loss": 1.5})
    assert find_resume(tmp_path).name == "recovery-9-10.pth.tar"
    position, _ = resume(make_run(), find_resume(tmp_path))
    assert position == Position(9, 10, 24, {"loss": 1.5})
    saver.save_checkpoint(9, 2.0)
    assert find_resume(tmp_path).name == "last.pth.tar"
    assert not list(tmp_path.glob("recovery*"))


def test_the_furthest_checkpoint_is_the_one_to_go_on_from(tmp_path):
    """Whatever its name: a recovery of epoch 9 is behind a last that has trained it to its end."""
    saver = RunSaver(make_run(), tmp_path)
    saver.save_recovery(9, 10, 24)
    stale = (tmp_path / "recovery-9-10.pth.tar").read_bytes()
    saver.save_checkpoint(9, 2.0)
    (tmp_path / "recovery-9-10.pth.tar").write_bytes(stale)  # it died before it could delete it
    assert find_resume(tmp_path).name == "last.pth.tar"
    saver.save_recovery(10, 1, 26)
    assert find_resume(tmp_path).name == "recovery-10-1.pth.tar"


def test_timm_reads_ours(tmp_path):
    run = make_run(ema=True)
    train(run, 3)
    RunSaver(run, tmp_path).save_checkpoint(4, 1.0)
    last, fresh = str(tmp_path / "last.pth.tar"), make_run(ema=True)
    assert resume_task_checkpoint(fresh.task, last, fresh.optimizer, log_info=False) == 5
    load_task_ema_checkpoint(fresh.task, last)
    assert_same(fresh.state(Position()), run.state(Position()))


def test_we_read_timms(tmp_path):
    run = make_run()
    train(run, 3)
    model = run.task.trainable_module
    saver = CheckpointSaver(model, run.optimizer, checkpoint_dir=str(tmp_path), task=run.task)
    saver.save_checkpoint(4, 1.0)
    last, fresh = tmp_path / "last.pth.tar", make_run(arch="sequential")
    position, content = resume(fresh, last)
    assert position == Position(epoch=5)
    assert_same(fresh.task.trainable_module.state_dict(), model.state_dict())
    again = RunSaver(fresh, tmp_path)
    again.restore(content, last)
    assert (again.best_metric, again.best_epoch) == (1.0, 4)


def test_in_another_folder_the_best_comes_along(tmp_path):
    run = make_run()
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    saver = RunSaver(run, old)
    saver.save_checkpoint(0, 5.0)
    saver.save_checkpoint(1, 4.0)
    _, content = resume(run, old / "last.pth.tar")
    moved = RunSaver(run, new)
    moved.restore(content, old / "last.pth.tar")
    assert torch.load(new / "model_best.pth.tar")["epoch"] == 0
    assert moved.save_checkpoint(2, 4.5) == (5.0, 0)


def test_a_best_whose_file_is_gone_is_searched_anew(tmp_path):
    run = make_run()
    saver = RunSaver(run, tmp_path, max_history=1)
    saver.save_checkpoint(0, 5.0)
    early = torch.load(tmp_path / "last.pth.tar")
    saver.save_checkpoint(1, 6.0)
    again = RunSaver(run, tmp_path, max_history=1)
    again.restore(early, tmp_path / "last.pth.tar")
    assert again.best_metric is None
    assert again.save_checkpoint(1, 4.0) == (4.0, 1)


@pytest.fixture
def no_room():
    """Files end after 2000 bytes, as on a full disk, but really: by the operating system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(n_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_weights_that_are_not_finite_are_those_of_an_epoch_counted_from_one(tmp_path):
    run = make_run()
    with torch.no_grad():
        run.task.trainable_module[0].bias.fill_(float("inf"))
    with pytest.raises(UserError, match=r"0\.bias is not after the last batch of epoch 17 "):
        RunSaver(run, tmp_path).save_checkpoint(16, 1.0)


@pytest.mark.parametrize("limit", [0, 100, 2000, 5000])
def test_a_full_disk_leaves_the_checkpoints_of_before(tmp_path, no_room, limit):
    run = make_run(width=300)
    saver = RunSaver(run, tmp_path)
    saver.save_checkpoint(0, 1.0)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    train(run, 1)
    no_room(limit)
    with pytest.raises(UserError) as error:
        saver.save_checkpoint(1, 2.0)
    with pytest.raises(UserError):
        saver.save_recovery(2, 1)
    no_room(resource.RLIM_INFINITY)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value) and "File too large" in str(error.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert (saver.best_metric, saver.best_epoch) == (1.0, 0)
    assert saver.save_checkpoint(1, 2.0) == (2.0, 1)


def test_a_full_disk_leaves_the_summary_of_before(tmp_path, no_room):
    summary = SummaryFile(tmp_path / "summary.csv")
    summary.append({"epoch": 0, "loss": 1.5})
    no_room(10)
    with pytest.raises(UserError, match=r"summary\.csv cannot be written: File too large"):
        summary.append({"epoch": 1, "loss": 1.25})
    no_room(resource.RLIM_INFINITY)
    assert (tmp_path / "summary.csv").read_text() == "epoch,loss\n0,1.5\n"


class Died(BaseException):
    """Stands for the end of the process."""


# the Path of Python 3.10 keeps references of its own to os.replace and os.unlink
STEPS = 11 if sys.version_info >= (3, 11) else 6


@pytest.mark.parametrize("last_call", range(STEPS + 1))
def test_a_death_at_any_step_of_saving_leaves_a_whole_run(tmp_path, monkeypatch, last_call):
    run = make_run()
    saver = RunSaver(run, tmp_path, max_history=2)
    for epoch, metric in enumerate([2.0, 1.0]):
        saver.save_checkpoint(epoch, metric)
    saver.save_recovery(2, 1, 7)
    calls = 0

    def counted(real):
        def call(*args, **settings):
            nonlocal calls
            if calls == last_call:
                raise Died
            calls += 1
            return real(*args, **settings)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "link", "fsync", "unlink"):
            patch.setattr(os, name, counted(getattr(os, name)))
        died = False
        try:
            saver.save_checkpoint(2, 3.0)
        except Died:
            died = True
    assert died == (last_call < STEPS), "the number of steps of saving has changed"
    fresh = make_run()
    source = find_resume(tmp_path)
    position, content = resume(fresh, source)
    again = RunSaver(fresh, tmp_path, max_history=2)
    again.restore(content, source)
    assert (position.epoch, position.batch) in [(2, 1), (3, 0)]
    assert torch.load(tmp_path / "model_best.pth.tar")["epoch"] == again.best_epoch
    assert all(Path(name).is_file() for name, _ in again.checkpoint_files)
    again.save_checkpoint(2, 3.0)
    kept = {"checkpoint-0.pth.tar", "checkpoint-2.pth.tar", "last.pth.tar", "model_best.pth.tar"}
    assert kept <= names(tmp_path)


def test_a_folder_without_hard_links_gets_copies(tmp_path, monkeypatch):
    def no_link(*args):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", no_link)
    saver = RunSaver(make_run(), tmp_path)
    saver.save_checkpoint(0, 1.0)
    last = (tmp_path / "last.pth.tar").read_bytes()
    assert (tmp_path / "model_best.pth.tar").read_bytes() == last


def test_another_architecture_is_an_error_that_names_both(tmp_path):
    RunSaver(make_run(), tmp_path).save_checkpoint(0, 1.0)
    with pytest.raises(UserError, match=r"resnet18;.* tiny"):
        resume(make_run(arch="resnet18"), tmp_path / "last.pth.tar")
    with pytest.raises(UserError, match="must fit"):
        resume(make_run(width=4), tmp_path / "last.pth.tar")


def test_another_optimizer_is_an_error_and_can_be_left_out(tmp_path):
    RunSaver(make_run(), tmp_path).save_checkpoint(0, 1.0)
    run = make_run()
    head = [{"params": [parameter]} for parameter in run.task.trainable_module.parameters()]
    run.optimizer = torch.optim.SGD(head, lr=0.1)
    with pytest.raises(UserError, match="optimizer"):
        resume(run, tmp_path / "last.pth.tar")
    assert resume(run, tmp_path / "last.pth.tar", weights_only=True)[0].epoch == 1


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_what_is_no_training_checkpoint_is_one_clear_line(tmp_path, content):
    path = tmp_path / "last.pth.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        resume(make_run(), find_resume(tmp_path))


def test_weights_alone_cannot_be_resumed(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    with pytest.raises(UserError, match="training run"):
        resume(make_run(), path)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="existing checkpoint"):
        find_resume(tmp_path / "missing")
    with pytest.raises(UserError, match="last"):
        find_resume(tmp_path)


@pytest.mark.parametrize(
    "content", [b"epoch,loss\n0,1\nx,2\n", b"a,b\n1,2\n", b"e\0\n1\n", b"\xff\xfe\n"]
)
def test_what_is_no_summary_is_one_clear_line_and_stays(tmp_path, content):
    path = tmp_path / "summary.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"summary\.csv must have one epoch per row; got .*summary"):
        SummaryFile(path)
    assert path.read_bytes() == content


def test_the_summary_keeps_one_header_and_drops_redone_epochs(tmp_path):
    path = tmp_path / "summary.csv"
    summary = SummaryFile(path)
    assert not path.exists()
    for epoch in range(3):
        summary.append({"epoch": epoch, "loss": epoch / 4})
    resumed = SummaryFile(path, first_epoch=2)
    resumed.append({"epoch": 2, "loss": 9, "drop_prob": 0.1})
    assert path.read_text() == "epoch,loss,drop_prob\n0,0.0,\n1,0.25,\n2,9,0.1\n"


def test_a_file_that_is_no_summary_is_an_error(tmp_path):
    path = tmp_path / "summary.csv"
    path.write_text("name,age\nx,3\n")
    with pytest.raises(UserError, match=str(path)):
        SummaryFile(path)
