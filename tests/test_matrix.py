"""Every regularizer in every way of training: two short epochs each, with train.py's own flags.

`python tests/test_matrix.py > docs/matrix.md` writes the table of what is tested here.
"""

import csv
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from unittest.mock import patch

import pytest
import timm
import torch
import torch.multiprocessing as mp
from script import ROOT, load_script, write_images
from timm.utils import NativeScaler, unwrap_model
from torch import Tensor

import timm_structdrop
from timm_structdrop.models.placement import structdrop_layers
from timm_structdrop.training import Loop

train = load_script("train")
NAMES = sorted(timm_structdrop.regularizers)
RATE, IMAGES, BATCH, EPOCHS = 0.2, 32, 8, 2
FLAGS = (
    "--num-classes", "2", "--in-chans", "1", "--img-size", "16", "--batch-size", str(BATCH),
    "--workers", "0", "--device", "cpu", "--seed", "1", "--epochs", str(EPOCHS), "--opt", "sgd",
    "--lr", "0.05", "--sched", "none", "--warmup-epochs", "0", "--hflip", "0",
    "--color-jitter", "0", "--drop-block", str(RATE), "--drop-schedule", "linear",
    "--cluster-start", "0", "--experiment", "run",
)  # fmt: skip


@dataclass
class Trained:
    """A run: its folder, and the objects it ended with."""

    folder: Path
    loop: Loop

    @property
    def state(self) -> dict[str, Tensor]:
        return unwrap_model(self.loop.run.task.get_trainable_module()).state_dict()

    @property
    def checkpoint(self) -> dict:
        return torch.load(self.folder / "last.pth.tar", weights_only=True)

    @property
    def rows(self) -> list[dict[str, str]]:
        with open(self.folder / "summary.csv", newline="") as file:
            return list(csv.DictReader(file))


SCRATCH: list[Path] = []


def scratch() -> Path:
    """A folder for what several tests share."""
    SCRATCH.append(Path(mkdtemp()))
    return SCRATCH[-1]


@pytest.fixture(scope="module", autouse=True)
def no_scratch_stays():
    yield
    for folder in SCRATCH:
        rmtree(folder)


@cache
def data() -> Path:
    return write_images(scratch(), train=IMAGES // 2, validation=4)


def run(folder: Path, *flags: str, stop_after: int | None = None) -> Trained:
    """train.py with these flags; stopped, as by SIGTERM, after an epoch if so asked."""
    loops = []
    train_to_the_end = train.run_to_the_end

    def watched(loop: Loop, start):
        loops.append(loop)
        if stop_after is not None:
            loop.after_epoch = lambda epoch: setattr(loop.stop, "requested", epoch == stop_after)
        return train_to_the_end(loop, start)

    with patch.object(train, "run_to_the_end", watched):
        if stop_after is None:
            train.main(flags)
        else:
            with pytest.raises(SystemExit) as stopped:
                train.main(flags)
            assert stopped.value.code == 143
    return Trained(folder / "run", loops[0])


def start(name: str, folder: Path, *flags: str, stop_after: int | None = None) -> Trained:
    where = ("--data-dir", str(data()), "--output", str(folder))
    model = ("--model", f"resnet8_{name}")
    return run(folder, *FLAGS, *model, *where, *flags, stop_after=stop_after)


@cache
def eager(name: str) -> Trained:
    """The run that the others are compared with."""
    return start(name, scratch())


def check(trained: Trained, batches_per_update: int = 1, processes: int = 1) -> None:
    """A finite loss, the rate of the schedule, and a checkpoint that is the model."""
    assert [row["epoch"] for row in trained.rows] == ["0", "1"]
    updates = math.ceil(IMAGES / BATCH / processes / batches_per_update)
    for epoch, row in enumerate(trained.rows):
        assert math.isfinite(float(row["train_loss"])) and math.isfinite(float(row["eval_loss"]))
        last = (epoch + 1) * updates - 1
        assert float(row["drop_prob"]) == pytest.approx(RATE * last / (EPOCHS * updates))
    saved = trained.checkpoint["state_dict"]
    assert saved.keys() == trained.state.keys()
    assert all(torch.equal(saved[key], value) for key, value in trained.state.items())
    assert all(value.isfinite().all() for value in saved.values())
    if "act1.dropcluster.labels" in saved:
        assert int(saved["act1.dropcluster.fitted_at"]) == 0
        assert len(saved["act1.dropcluster.labels"].unique()) == 15
    timm.create_model(trained.loop.run.arch, num_classes=2, in_chans=1, img_size=16
                      ).load_state_dict(saved)  # fmt: skip


def eagerly(name: str, folder: Path) -> None:
    check(eager(name))
    trained = eager(name)
    fresh = timm.create_model(f"resnet8_{name}", num_classes=2, in_chans=1, img_size=16)
    assert not torch.equal(trained.state["conv1.weight"], fresh.state_dict()["conv1.weight"])


def compiled(name: str, folder: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    check(start(name, folder, "--torchcompile", "aot_eager"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def in_bfloat16(name: str, folder: Path) -> None:
    trained = start(name, folder, "--amp", "--amp-dtype", "bfloat16")
    check(trained)
    assert {v.dtype for v in trained.state.values() if v.is_floating_point()} == {torch.float32}
    assert trained.rows[0]["train_loss"] != eager(name).rows[0]["train_loss"]


def in_float16(name: str, folder: Path) -> None:
    scaler = NativeScaler(device="cpu")
    with patch.object(train, "grad_scaler", lambda flags, process: scaler):
        trained = start(name, folder, "--amp", "--amp-dtype", "float16")
    check(trained)
    assert trained.checkpoint["amp_scaler"]["scale"] >= 1.0
    assert trained.rows[0]["train_loss"] != eager(name).rows[0]["train_loss"]


def channels_last(name: str, folder: Path) -> None:
    trained = start(name, folder, "--channels-last")
    check(trained)
    weight = trained.state["layer3.0.conv1.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert float(trained.rows[0]["train_loss"]) == pytest.approx(
        float(eager(name).rows[0]["train_loss"]), rel=1e-3
    )


def averaged(name: str, folder: Path) -> None:
    trained = start(name, folder, "--model-ema", "--model-ema-decay", "0.5")
    check(trained)
    average = trained.checkpoint["state_dict_ema"]
    assert average.keys() == trained.state.keys()
    assert average["bn1.running_mean"].all(), "the averages are those of the start"
    for key, value in trained.state.items():
        assert average[key].isfinite().all()
        if value.is_floating_point() and value.numel() > 100:
            assert not torch.equal(average[key], value)
        elif "dropcluster" in key:
            assert torch.equal(average[key], value)


def accumulating(name: str, folder: Path) -> None:
    check(start(name, folder, "--grad-accum-steps", "2"), batches_per_update=2)


def checkpointing(name: str, folder: Path) -> None:
    trained = start(name, folder, "--grad-checkpointing")
    check(trained)
    for key, value in eager(name).state.items():
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(trained.state[key], value, rtol=1e-3, atol=1e-4)


def resumed(name: str, folder: Path) -> None:
    start(name, folder, stop_after=0)
    trained = run(folder, "--resume", str(folder / "run"))
    check(trained)
    assert trained.rows == eager(name).rows
    for key, value in eager(name).state.items():
        assert torch.equal(trained.state[key], value), key


def at_another_resolution(name: str, folder: Path) -> None:
    start(name, folder, stop_after=0)
    flags = ("--resume", str(folder / "run"), "--img-size", "24")
    if name == "dropcluster":
        with pytest.warns(UserWarning, match="fitted on 16x16 maps are resampled to 24x24"):
            trained = run(folder, *flags)
        assert trained.state["act1.dropcluster.labels"].shape == (16, 24, 24)
        assert trained.state["act1.dropcluster.fitted_size"].tolist() == [16, 16]
    else:
        trained = run(folder, *flags)
    check(trained)
    assert trained.rows[0] == eager(name).rows[0]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def one_rank(rank: int, ports: list[int], folder: str, images: str) -> None:
    torch.set_num_threads(1)
    for name, port in zip(NAMES, ports, strict=True):
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        where = ("--data-dir", images, "--output", f"{folder}/{name}")
        trained = run(Path(folder) / name, *FLAGS, "--model", f"resnet8_{name}", *where)
        if rank == 0:
            check(trained, processes=2)
        rates = [layer.rate() for layer in structdrop_layers(trained.loop.run.task)]
        torch.save((trained.state, rates), f"{folder}/{name}-{rank}.pt")


@cache
def both_ranks() -> Path | mp.ProcessRaisedException:
    """All regularizers trained by the same two processes: the folder, or why there is none."""
    folder = scratch()
    ports = [free_port() for _ in NAMES]
    try:
        mp.spawn(one_rank, (ports, str(folder), str(data())), nprocs=2)
    except mp.ProcessRaisedException as error:
        return error
    return folder


def on_two_ranks(name: str, folder: Path) -> None:
    ranks = both_ranks()
    if isinstance(ranks, Exception):
        raise ranks
    (state, rates), (other, other_rates) = (
        torch.load(ranks / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert rates == other_rates
    assert state.keys() == other.keys()
    for key, value in state.items():
        assert torch.equal(value, other[key]), key


@dataclass(frozen=True)
class Mode:
    """A way of training: what it is called, what is checked beside the common things, the test."""

    title: str
    checked: str
    cell: Callable[[str, Path], None]


MODES = [
    Mode("eager", "the weights move", eagerly),
    Mode(
        "`torch.compile`", "no graph breaks; backend aot_eager, the fit of clusters eager", compiled
    ),
    Mode("AMP bfloat16", "weights stay float32", in_bfloat16),
    Mode("AMP float16", "on the CPU, with the gradient scaling of a GPU", in_float16),
    Mode("`channels_last`", "the loss of the eager run", channels_last),
    Mode("EMA", "averages are finite and not the weights; clusters are the model's", averaged),
    Mode("gradient accumulation", "the rate moves by updates, not by batches", accumulating),
    Mode("gradient checkpointing", "the weights of the eager run", checkpointing),
    Mode("DDP, 2 ranks", "gloo; both ranks end with equal weights, rates, clusters", on_two_ranks),
    Mode("resume", "to the bit the run that was not stopped", resumed),
    Mode("resolution change", "16 px, resumed at 24 px; clusters resampled", at_another_resolution),
]
IDS = [mode.title.replace("`", "") for mode in MODES]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # checkpointed stems
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES, ids=IDS)
def test_cell(mode, name, tmp_path):
    mode.cell(name, tmp_path)


def table() -> str:
    """docs/matrix.md: one cell for each case of `test_cell`."""
    lines = [
        "# Regularizers and ways of training",
        "",
        "Each cell is a test: `train.py` trains a ResNet-8 with the regularizer for two short",
        "epochs on 16 x 16 images, on the CPU. The loss is finite, the drop rate is that of its",
        "linear schedule, the checkpoint is the model and loads strictly, DropCluster has fitted",
        "its clusters; and what the last column says. No cell is left out. GPUs and the inductor",
        "backend are not part of it.",
        "",
        "Generated by `python tests/test_matrix.py > docs/matrix.md`.",
        "",
        f"| | {' | '.join(NAMES)} | also checked |",
        f"|---|{':-:|' * len(NAMES)}---|",
    ]
    lines += [f"| {mode.title} | {'yes | ' * len(NAMES)}{mode.checked} |" for mode in MODES]
    return "\n".join(lines) + "\n"


def test_the_documented_table_is_this_one():
    assert (ROOT / "docs" / "matrix.md").read_text() == table()


if __name__ == "__main__":
    print(table(), end="")
