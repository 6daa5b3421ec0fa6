"""What a checkpoint costs: with DropCluster over without, and over timm's own saver.

    python -m benchmarks.checkpoint [--repeats N] [--quick]

Saving is all that happens at the end of an epoch (weights, optimizer and position written, synced
to the disk, renamed; the ranked names linked), loading is a resume, and the export is the Hub's
folder with safetensors, which is checked by building the model from it. The share of an epoch is
that of saving once, beside the training steps of the same model.
"""

import shutil
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import CheckpointSaver
from torch import nn

from benchmarks._models import make_training
from benchmarks._settings import Settings
from benchmarks._text import milliseconds, percent, ratio, table
from benchmarks._timing import Times, compared, one_thread, paired, spread
from timm_structdrop.hub import export_model
from timm_structdrop.training import RunSaver, RunState, find_resume, resume

TITLE = "Checkpoints"
CPU_ONLY = True
# Architecture: shape of the images, steps of an epoch (the digits; CIFAR-100), rounds.
CASES = {"lenet5": ((32, 1, 32, 32), 44, 21), "resnet50": ((128, 3, 32, 32), 390, 5)}
ACTIONS = ("save", "load", "export")


class Run:
    """A training whose state is saved, loaded and exported in a folder of its own."""

    def __init__(self, name: str, shape: tuple[int, int, int, int], folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        folder.mkdir()
        size = {"img_size": shape[2]} if "_" in name else {}
        self.model: nn.Module = timm.create_model(name, num_classes=10, in_chans=shape[1], **size)
        self.task, self.optimizer = make_training(self.model)
        self.images, self.target = torch.randn(shape), torch.randint(10, shape[:1])
        self.state = RunState(name, self.task, self.optimizer)
        self.saver = RunSaver(self.state, folder, max_history=1)
        self.epochs = count()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.task(self.images, self.target)["loss"].backward()
        self.optimizer.step()

    def save(self) -> None:
        epoch = next(self.epochs)
        self.saver.save_checkpoint(epoch, metric=float(epoch))

    def load(self) -> None:
        resume(self.state, find_resume(self.folder))

    def export(self) -> None:
        shutil.rmtree(self.exported, ignore_errors=True)
        export_model(self.model, self.exported)

    @property
    def exported(self) -> Path:
        return self.folder / "exported"

    def megabytes(self) -> dict[str, float]:
        files = {
            "checkpoint": find_resume(self.folder),
            "safetensors": self.exported / "model.safetensors",
        }
        return {name: path.stat().st_size / 1e6 for name, path in files.items()}


def timm_save(run: Run, folder: Path) -> Callable[[], None]:
    """The end of an epoch with timm's saver, for the same model and optimizer."""
    folder.mkdir()
    saver = CheckpointSaver(
        run.model, run.optimizer, checkpoint_dir=str(folder), recovery_dir=str(folder),
        max_history=1,
    )  # fmt: skip
    epochs = count()

    def save() -> None:
        epoch = next(epochs)
        saver.save_checkpoint(epoch, metric=float(epoch))

    return save


def run(settings: Settings) -> list[dict[str, Any]]:
    """One row per architecture: DropCluster's actions over the plain ones, sizes, shares."""
    names = settings.pick(tuple(CASES), ("lenet5",))
    with one_thread():
        return [row(name, settings) for name in names]


def row(architecture: str, settings: Settings) -> dict[str, Any]:
    shape, steps, rounds = CASES[architecture]
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            kind: Run(name, shape, Path(folder) / kind)
            for kind, name in (
                ("plain", architecture),
                ("dropcluster", f"{architecture}_dropcluster"),
            )
        }
        for one in runs.values():
            one.step()  # the optimizer has no state, and DropCluster no clusters, before
        rounds = settings.rounds(rounds)
        times: dict[str, dict[str, Times]] = {
            action: paired({kind: getattr(runs[kind], action) for kind in runs}, rounds, warm_up=1)
            for action in (*ACTIONS, "step")
        }
        plain = runs["plain"]
        savers = {"ours": plain.save, "timm": timm_save(plain, Path(folder) / "timm")}
        by_saver = paired(savers, rounds, warm_up=1)
        sizes = {kind: one.megabytes() for kind, one in runs.items()}
    step = spread(times["step"]["dropcluster"].elapsed)["median"]
    actions = {name: compared(times[name]["dropcluster"], times[name]["plain"]) for name in ACTIONS}
    return {
        "architecture": architecture,
        "shape": shape,
        "steps_an_epoch": steps,
        "step_ms": step,
        "actions": actions,
        "save_over_timm": compared(by_saver["ours"], by_saver["timm"]),
        "megabytes": sizes,
        "share_of_an_epoch": actions["save"]["ms"]["median"] / (steps * step),
    }


def headline(rows: list[dict[str, Any]]) -> str:
    found = "; ".join(
        f"{row['architecture']} {percent(row['share_of_an_epoch'])} of an epoch of "
        f"{row['steps_an_epoch']} steps, {row['actions']['save']['ratio']['median']:.2f} of the "
        "plain model's"
        for row in rows
    )
    return f"Saving a checkpoint with DropCluster: {found}."


def report(rows: list[dict[str, Any]]) -> list[str]:
    cells, sizes = [], []
    for row in rows:
        for name, found in row["actions"].items():
            cells.append(
                [
                    row["architecture"],
                    name,
                    milliseconds(found["other_ms"]),
                    ratio(found["ratio"]),
                    str(found["repeats"]),
                ]
            )
        plain, ours = row["megabytes"]["plain"], row["megabytes"]["dropcluster"]
        sizes.append(
            [
                row["architecture"],
                *(f"{ours[name]:.3f} / {plain[name]:.3f} MB" for name in ours),
                ratio(row["save_over_timm"]["ratio"]),
                f"{row['shape'][0]} at {row['shape'][2]} px, {row['steps_an_epoch']} steps of "
                f"{milliseconds({'median': row['step_ms']})}",
                percent(row["share_of_an_epoch"]),
            ]
        )
    return [
        *table(["model", "action", "plain model", "with DropCluster / plain", "rounds"], cells),
        "",
        *table(
            [
                "model",
                "checkpoint, DropCluster / plain",
                "safetensors, the same",
                "saving / timm's saver",
                "an epoch",
                "saving once, of it",
            ],
            sizes,
        ),
    ]


if __name__ == "__main__":
    from benchmarks._suite import alone

    alone("checkpoint")
