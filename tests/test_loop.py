"""The loop on data small enough to know the answer."""

import os
import random
import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from timm_structdrop.errors import UserError
from timm_structdrop.training import (
    Loop,
    LoopSettings,
    Position,
    Ranking,
    RunSaver,
    RunState,
    StructDropTask,
    SummaryFile,
    TrainingStopped,
    derive_seed,
    find_resume,
    fit,
    make_task,
    read_summary,
    resume,
    seed_everything,
    set_loader_epoch,
)

IMAGES = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
TARGETS = (IMAGES[:, 0] > 0).long()


def make_loop(batch_size: int = 4, shuffle: bool = True, workers: int = 0, **settings) -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    task = make_task(model, nn.CrossEntropyLoss(), verbose=False)
    run = RunState("tiny", task, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    data = TensorDataset(IMAGES, TARGETS)
    loader = DataLoader(data, batch_size, shuffle=shuffle, num_workers=workers)
    return Loop(run, loader, torch.device("cpu"), LoopSettings(**{"epochs": 3, **settings}))


def weights(loop: Loop) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in loop.run.task.parameters()])


def without_dropout(loop: Loop) -> Loop:
    loop.run.task.trainable_module[1].p = 0.0
    return loop


def test_accumulated_batches_make_the_update_of_one_large_batch():
    """20 images: 2 updates of 8 and one of 4, whether in batches of 4 or of 8."""
    large = without_dropout(make_loop(batch_size=8, shuffle=False, epochs=1))
    small = without_dropout(make_loop(batch_size=4, shuffle=False, epochs=1, grad_accum_steps=2))
    (one,), (other,) = fit(large), fit(small)
    torch.testing.assert_close(weights(small), weights(large))
    assert other["train"]["loss"] == pytest.approx(one["train"]["loss"])
    assert small.updates_per_epoch == large.updates_per_epoch == 3


def test_means_are_over_images_not_over_batches():
    loop = without_dropout(make_loop(batch_size=16, shuffle=False, epochs=1))
    for group in loop.run.optimizer.param_groups:
        group["lr"] = 0.0
    with torch.no_grad():
        output = loop.run.task.trainable_module(IMAGES)
    (result,) = fit(loop)
    expected = nn.functional.cross_entropy(output, TARGETS)
    assert result["train"]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert result["train"]["top1"] == pytest.approx(
        100 * float((output.argmax(1) == TARGETS).float().mean())
    )


def random_numbers_of(**settings) -> list[float]:
    """What a model's forwards would draw from torch's generator, batch by batch."""
    loop = make_loop(**settings)
    drawn = []
    loop.run.task.trainable_module.register_forward_hook(
        lambda *_: drawn.append(float(torch.rand(())))
    )
    fit(loop)
    return drawn


def test_every_batch_of_every_epoch_seed_and_rank_has_random_numbers_of_its_own():
    one = random_numbers_of(epochs=3)
    assert len(one) == 15
    others = random_numbers_of(epochs=3, seed=7), random_numbers_of(epochs=3, rank=1)
    assert len({*one, *others[0], *others[1]}) == 45
    assert random_numbers_of(epochs=3) == one


class TermAt:
    """In the place of a learning rate scheduler: asks the process to end after one update."""

    def __init__(self, update: int) -> None:
        self.update = update

    def step(self, epoch: int, metric: float | None = None) -> None:
        pass

    def step_update(self, update: int) -> None:
        if update == self.update:
            os.kill(os.getpid(), signal.SIGTERM)


def with_files(loop: Loop, folder, first_epoch: int = 0) -> Loop:
    loop.saver = RunSaver(loop.run, folder, loop.ranking.decreasing)
    loop.summary = SummaryFile(folder / "summary.csv", first_epoch)
    return loop


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
@pytest.mark.parametrize("update", [1, 3, 4, 5, 8])
def test_sigterm_finishes_the_update_and_the_run_goes_on_from_there(
    tmp_path, update, grad_accum_steps
):
    settings = {"grad_accum_steps": grad_accum_steps}
    whole = with_files(make_loop(**settings), tmp_path)
    fit(whole)
    expected = (tmp_path / "summary.csv").read_text()
    folder = tmp_path / "stopped"
    folder.mkdir()
    stopped = with_files(make_loop(**settings), folder)
    stopped.run.scheduler = TermAt(update)
    with pytest.raises(TrainingStopped):
        fit(stopped)
    assert find_resume(folder).name.startswith("recovery-")
    again = make_loop(**settings)
    torch.randn(7)
    position, _ = resume(again.run, find_resume(folder))
    assert position.update == again.updates_before(position) == update
    fit(with_files(again, folder, position.epoch), position)
    assert torch.equal(weights(again), weights(whole))
    assert (folder / "summary.csv").read_text() == expected
    for one, other in zip(
        again.run.optimizer.state.values(), whole.run.optimizer.state.values(), strict=True
    ):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])


@pytest.mark.parametrize("stream, reads", [(False, 40 - 8), (True, 40)])
def test_a_run_that_goes_on_does_not_read_what_it_has_trained_on(tmp_path, stream, reads):
    """After 2 of 5 batches of epoch 1 of 2; a stream has to be read from its beginning."""

    class Rows(TensorDataset):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    class Stream(IterableDataset):
        read = 0

        def __iter__(self):
            for row in zip(IMAGES, TARGETS, strict=True):
                self.read += 1
                yield row

        def __len__(self):
            return len(IMAGES)

    def loop_over(data):
        loop = make_loop(epochs=2)
        loop.loader = DataLoader(data, 4, shuffle=not stream)
        return loop

    make = Stream if stream else lambda: Rows(IMAGES, TARGETS)
    stopped = with_files(loop_over(make()), tmp_path)
    stopped.run.scheduler = TermAt(2)
    with pytest.raises(TrainingStopped):
        fit(stopped)
    again = loop_over(make())
    position, _ = resume(again.run, find_resume(tmp_path))
    assert (position.epoch, position.batch) == (0, 2)
    fit(again, position)
    assert again.loader.dataset.read == reads
    whole = loop_over(make())
    fit(whole)
    assert torch.equal(weights(again), weights(whole))


def one_of_two(rank: int, store: str, folder: str) -> None:
    """Trains to the end, then the same again with an end and a resume after 2 of 3 batches."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )

    def loop_of_rank(name: str, update: int | None = None) -> tuple[Loop, Position]:
        loop = make_loop(epochs=1, rank=rank, world_size=2)
        data = loop.loader.dataset
        sampler = DistributedSampler(data, num_replicas=2, rank=rank)
        loop.loader = DataLoader(data, 4, sampler=sampler)
        position = Position()
        if name == "again":
            position, _ = resume(loop.run, find_resume(Path(folder, "stopped")))
        loop.run.task.prepare_distributed()
        loop.run.scheduler = None if update is None else TermAt(update)
        Path(folder, name).mkdir(exist_ok=True)
        return with_files(loop, Path(folder, name)) if rank == 0 else loop, position

    fit(*loop_of_rank("whole"))
    with pytest.raises(TrainingStopped):
        fit(*loop_of_rank("stopped", update=2))
    torch.distributed.barrier()
    fit(*loop_of_rank("again"))
    torch.distributed.destroy_process_group()


def test_the_means_of_an_epoch_that_two_processes_went_on_with_are_those_of_all_images(tmp_path):
    mp.spawn(one_of_two, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    (whole,), (again,) = (
        read_summary(tmp_path / name / "summary.csv") for name in ("whole", "again")
    )
    for column in ("train_loss", "train_top1"):
        assert float(again[column]) == pytest.approx(float(whole[column]), rel=1e-12)


def test_parts_of_the_loss_that_a_task_names_get_columns_of_their_own(tmp_path):
    class WithParts(StructDropTask):
        def step(self, input, target):
            result = super().step(input, target)
            return {**result, "kl": torch.tensor(float(len(target)))}

    loop = make_loop(batch_size=16, epochs=1)
    loop.run.task = WithParts(loop.run.task.trainable_module, verbose=False)
    (result,) = fit(with_files(loop, tmp_path))
    assert result["train"]["kl"] == pytest.approx((16 * 16 + 4 * 4) / 20)
    assert list(result["train"]) == ["loss", "top1", "kl"]
    assert "train_top1,train_kl,lr" in (tmp_path / "summary.csv").read_text()


@pytest.mark.parametrize("update", [None, 2])
def test_after_the_training_the_old_handlers_are_back(update):
    """Also after a SIGTERM, from which on a worker's end (SIGCHLD) is not heard."""

    def heard(number, frame) -> None:
        pass

    usual = signal.signal(signal.SIGCHLD, heard)
    before = signal.getsignal(signal.SIGTERM)
    loop = make_loop(epochs=1)
    loop.run.scheduler = None if update is None else TermAt(update)
    try:
        with nullcontext() if update is None else pytest.raises(TrainingStopped):
            fit(loop)
        assert signal.getsignal(signal.SIGCHLD) is heard
    finally:
        signal.signal(signal.SIGCHLD, usual)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_loss_that_is_not_finite_names_its_step():
    loop = make_loop()
    with torch.no_grad():
        loop.run.task.trainable_module[0].bias.fill_(float("nan"))
    with pytest.raises(UserError, match="got nan in epoch 1/3, batch 1/5 "):
        fit(loop)


def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path):
    """A loss that is finite, and gradients that are not: the loss would tell one step later."""
    loop = with_files(make_loop(recovery_interval=1), tmp_path)
    loop.saver.save_recovery(0, 0)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    bias = loop.run.task.trainable_module[2].bias
    bias.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(UserError, match=r"finite to be saved; 2.bias .* batch 1 of epoch 1 "):
        fit(loop)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_evaluation_and_checkpoints_come_every_val_interval_and_at_the_end(tmp_path):
    loop = with_files(make_loop(epochs=5, val_interval=2, eval_metric="loss"), tmp_path)
    evaluated = []

    def evaluate(model, title):
        evaluated.append(title)
        return {"loss": 1.0, "top1": 50.0, "top5": 100.0}

    loop.evaluate = evaluate
    results = fit(loop)
    assert evaluated == ["Validate"] * 3
    assert [result["epoch"] for result in results if "validation" in result] == [1, 3, 4]
    assert {file.name for file in tmp_path.glob("checkpoint-*")} == {
        f"checkpoint-{epoch}.pth.tar" for epoch in (1, 3, 4)
    }
    rows = (tmp_path / "summary.csv").read_text().splitlines()
    assert len(rows) == 6 and rows[1].endswith(",,,,0.1") and rows[2].endswith("1.0,50.0,100.0,0.1")


def test_a_saver_that_would_keep_the_worst_is_refused(tmp_path):
    loop = make_loop()
    loop.saver = RunSaver(loop.run, tmp_path)
    with pytest.raises(UserError, match="must be True for checkpoints ranked by training loss"):
        fit(loop)
    assert not list(tmp_path.iterdir())


def test_epochs_that_were_not_evaluated_do_not_rank():
    top1, loss = Ranking.of_run("top1", True), Ranking.of_run("top1", False)
    results = [
        {"epoch": 0, "train": {"loss": 2.0, "top1": 60.0}, "validation": {"top1": 50.0}},
        {"epoch": 1, "train": {"loss": 1.0, "top1": 99.0}},
        {"epoch": 2, "train": {"loss": 3.0, "top1": 50.0}, "validation": {"top1": 40.0}},
    ]
    assert [one["epoch"] for one in sorted(results, key=top1.sort_key)] == [1, 2, 0]
    assert [one["epoch"] for one in sorted(results, key=loss.sort_key)] == [2, 0, 1]
    assert (top1.words, loss.words) == ("validation top1", "training loss")


def test_averaged_weights_are_what_counts():
    loop = make_loop(epochs=1)
    averaged = loop.run.task.setup_ema(decay=0.5)

    def evaluate(model, title):
        return {"loss": 0.0, "top1": float(model is averaged), "top5": 0.0}

    loop.evaluate = evaluate
    assert fit(loop)[0]["validation"]["top1"] == 1.0


@pytest.mark.parametrize(
    "device, weights", [("cpu", "state_dict_ema"), ("cpu:0", "state_dict"), (None, "state_dict")]
)
def test_a_checkpoint_says_which_weights_its_figures_are_of(tmp_path, device, weights):
    """To the loop, cpu:0 is another device than cpu."""
    loop = make_loop(epochs=1)
    if device is not None:
        loop.run.task.setup_ema(decay=0.5, device=torch.device("cpu"))
        loop.device = torch.device(device)
    figures = {"loss": 0.5, "top1": 50.0, "top5": 100.0}
    loop.evaluate = lambda model, title: figures
    fit(with_files(loop, tmp_path))
    saved = torch.load(tmp_path / "model_best.pth.tar", weights_only=True)
    assert saved["validation"] == {"weights": weights, **figures}


def test_without_an_evaluation_a_checkpoint_has_no_figures(tmp_path):
    fit(with_files(make_loop(epochs=1), tmp_path))
    assert "validation" not in torch.load(tmp_path / "last.pth.tar", weights_only=True)


def test_averages_know_the_update_across_epochs():
    loop, steps = make_loop(epochs=2, grad_accum_steps=2), []
    loop.run.task.update_ema = lambda step: steps.append(step)
    fit(loop)
    assert steps == [1, 2, 3, 4, 5, 6]


def test_clipping_bounds_the_step():
    loop = make_loop(epochs=1, clip_grad=1e-3, batch_size=20)
    before = weights(loop).clone()
    fit(loop)
    step = float((weights(loop) - before).norm())
    assert 0 < step <= 0.1 * 1e-3 * 1.001


def test_mixup_ends_with_its_epoch():
    loop = make_loop(mixup_off_epoch=1)

    class Mix:
        def __init__(self):
            self.mixup_enabled = True
            self.seen = []

        def __call__(self, images, target):
            self.seen.append(self.mixup_enabled)
            return images, nn.functional.one_hot(target, 2).float()

    loop.mixup = Mix()
    fit(loop)
    assert loop.mixup.seen == [True] * 5 + [False] * 10


def test_seeds_differ_in_purpose_and_position_and_need_no_state():
    positions = [("data", 0, 1), ("data", 1, 0), ("step", 0, 1), ("data", 0, 2)]
    seeds = [derive_seed(*position) for position in positions]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**63 for seed in seeds)
    draws = []
    for _ in range(2):
        seed_everything("step", 3, 4)
        draws.append((np.random.rand(), torch.rand(2).tolist(), random.random()))
        torch.rand(5)
    assert draws[0] == draws[1]
    with pytest.raises(UserError, match="at least 0"):
        derive_seed("data", -1)


def test_the_order_of_an_epoch_does_not_depend_on_the_workers():
    orders = []
    for workers in (0, 1):
        loader = DataLoader(TensorDataset(torch.arange(20)), 4, shuffle=True, num_workers=workers)
        for epoch in (0, 1):
            set_loader_epoch(loader, seed=5, epoch=epoch)
            batches = iter(loader)
            torch.rand(workers + 1)
            orders.append(torch.cat([batch for (batch,) in batches]).tolist())
    assert orders[:2] == orders[2:]
    assert orders[0] != orders[1] and sorted(orders[0]) == list(range(20))
