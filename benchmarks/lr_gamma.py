"""Accuracy over learning rate and gamma of CamDrop, the paper's Fig. 4, as its authors ran it.

    python -m benchmarks.lr_gamma --dataset digits
    python -m benchmarks.lr_gamma --dataset torch/mnist --data-dir DIR --dataset-download

Each cell is a training after the authors' MNIST script (the recipe camdrop-fig4 has it in full): a
ResNet with two blocks a group, CamDrop with blocks of 7 in group 3 alone, where the map is 7 x 7,
Adam without weight decay, the learning rate times 0.3 after each third of the epochs (theirs: every
10 of 100), gamma falling linearly from 1 to its value, batches of 32 (theirs: 128), no
augmentation; and its top-1 after the last epoch. gamma = 1 is training without CamDrop.
A training whose loss is not finite stops there and counts as chance.

Cells in the CSV file are not trained again, so a sweep that was stopped goes on.
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._record import RESULTS, circumstances, output_stem, quietly_trained
from timm_structdrop.analysis.figure import new_figure
from timm_structdrop.errors import UserError, run_command
from timm_structdrop.files import save_csv, save_json, save_png
from timm_structdrop.training import Progress

RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 5.0, 10.0, 15.0)
GAMMAS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
SETTINGS = ("dataset", "model", "epochs", "batch_size", "img_size", "block_size", "guide", "seed")
DECAYS = 3
NOT_FINITE = "the loss must be finite"


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--dataset", default="digits", metavar="NAME", help="digits, torch/mnist, ... (digits)")
    add("--data-dir", metavar="DIR", help="folder of the data")
    add("--dataset-download", action="store_true", help="let torch/ download")
    add("--num-classes", type=int, default=10, metavar="N", help="classes (10)")
    add("--model", default="resnet14", metavar="NAME", help="an architecture (resnet14)")
    add("--rates", type=float, nargs="+", default=RATES, metavar="LR", help="0.03 to 15")
    add("--gammas", type=float, nargs="+", default=GAMMAS, metavar="P", help="0.5 to 1")
    add("--epochs", type=int, default=9, metavar="N", help="of each training (9)")
    add("--batch-size", type=int, default=32, metavar="N", help="images per step (32)")
    add("--img-size", type=int, default=28, metavar="N", help="image size (28)")
    add("--block-size", type=int, default=7, metavar="N", help="r of CamDrop (7)")
    add(
        "--guide",
        default="cam",
        choices=("cam", "predicted", "avg"),
        help="of CamDrop; predicted and avg know no label (cam)",
    )
    add("--seed", type=int, default=42, metavar="S", help="42 if not given")
    add("--output", metavar="PATH", help="without .csv; benchmarks/results/lr-gamma-DATASET")
    return parser


def missing(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Iterator[tuple[float, float]]:
    """The cells that are not in the file, those without CamDrop first."""
    done = {(float(row["lr"]), float(row["gamma"])) for row in rows}
    for gamma in sorted(set(args.gammas), reverse=True):
        for rate in sorted(set(args.rates)):
            if (rate, gamma) not in done:
                yield rate, gamma


def earlier_rows(args: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    """What an earlier sweep left, which must have had the same settings."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = list(csv.DictReader(path.read_text().splitlines()))
    for name in SETTINGS:
        values = {row.get(name) for row in rows} - {str(getattr(args, name))}
        if values:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} must be that of the cells in {path.name}, {values.pop()}; "
                f"got {getattr(args, name)} (another --output begins anew)"
            )
    return rows


def train_cell(args: argparse.Namespace, rate: float, gamma: float) -> dict[str, Any]:
    """One training; its row of the file."""
    command = [
        "--model", f"{args.model}_camdrop", "--drop-block", str(round(1 - gamma, 6)),
        "--model-kwargs", "stages=[3]", f"block_size={args.block_size}", f"guide={args.guide}",
        "--drop-schedule", "linear",
        "--dataset", args.dataset, "--num-classes", str(args.num_classes), "--in-chans", "1",
        "--img-size", str(args.img_size), "--batch-size", str(args.batch_size),
        "--epochs", str(args.epochs), "--val-interval", str(args.epochs),
        "--opt", "adam", "--weight-decay", "0", "--lr", str(rate),
        "--sched", "step", "--sched-on-updates", "--decay-epochs", str(args.epochs / DECAYS),
        "--decay-rate", "0.3", "--warmup-epochs", "0", "--smoothing", "0",
        "--no-aug", "--workers", "0", "--seed", str(args.seed),
    ]  # fmt: skip
    command += ["--data-dir", args.data_dir] if args.data_dir else []
    command += ["--dataset-download"] if args.dataset_download else []
    start = time.perf_counter()
    top1, loss = 100 / args.num_classes, "not finite"
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = quietly_trained(Path(folder) / "run", command)
            last = list(csv.DictReader((run / "summary.csv").read_text().splitlines()))[-1]
            top1, loss = float(last["eval_top1"]), last["train_loss"]
        except UserError as error:
            if NOT_FINITE not in str(error):
                raise
    return {
        **{name: getattr(args, name) for name in SETTINGS},
        "lr": rate,
        "gamma": gamma,
        "top1": round(top1, 3),
        "train_loss": loss,
        "seconds": round(time.perf_counter() - start, 1),
    }


def reach(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By gamma: the best top-1, and the largest learning rate at which it is above 50 %."""
    found: dict[str, Any] = {}
    for gamma in sorted({float(row["gamma"]) for row in rows}, reverse=True):
        top1 = {
            float(row["lr"]): float(row["top1"]) for row in rows if float(row["gamma"]) == gamma
        }
        trains = [rate for rate, value in top1.items() if value > 50]
        found[f"{gamma:g}"] = {
            "best_top1": max(top1.values()),
            "largest_rate_above_50": max(trains, default=None),
        }
    return {"by_gamma": found}


def draw(args: argparse.Namespace, rows: list[dict[str, Any]], path: Path) -> None:
    cells = {
        (float(row["lr"]), float(row["gamma"])): float(row["top1"])
        for row in rows
        if float(row["lr"]) in args.rates and float(row["gamma"]) in args.gammas
    }
    if len(set(args.rates)) > 1 and len(set(args.gammas)) > 1:
        title = (
            f"CamDrop (r = {args.block_size}, guide {args.guide}) on {args.model}, {args.dataset} "
            f"at {args.img_size} px: top-1 after {args.epochs} epochs of Adam, one run per cell"
        )
        save_png(draw_accuracy_surface(cells, title), path)


def draw_accuracy_surface(top1: Mapping[tuple[float, float], float], title: str) -> Any:
    """Fig. 4 of CamDrop: a surface over the learning rate, in equal steps, and gamma; beside it
    the same figures as a table of colours.

    Args:
        top1: percent by (learning rate, gamma), all pairs of at least two of each; gamma = 1 is
            training without CamDrop.
        title: of the picture.

    Returns:
        A matplotlib figure.
    """
    rates = sorted({rate for rate, _ in top1})
    gammas = sorted({gamma for _, gamma in top1}, reverse=True)
    grid = np.array([[top1[rate, gamma] for rate in rates] for gamma in gammas])
    import_module("mpl_toolkits.mplot3d")  # registers the projection
    figure = new_figure(12.4, 5.2)
    figure.suptitle(title, fontsize=11)
    surface = figure.add_axes((0.0, 0.05, 0.46, 0.86), projection="3d", computed_zorder=False)
    _draw_surface(surface, rates, gammas, grid)
    _draw_table(figure.add_axes((0.54, 0.13, 0.44, 0.74)), rates, gammas, grid)
    return figure


def _draw_surface(axis: Any, rates: Sequence[float], gammas: Sequence[float], grid: Any) -> None:
    x, y = np.meshgrid(np.arange(len(rates)), np.asarray(gammas))
    axis.plot_surface(
        x, y, grid, cmap="viridis", vmin=0, vmax=100, edgecolor="black", linewidth=0.4, alpha=0.9,
        rstride=1, cstride=1,
    )  # fmt: skip
    axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates], fontsize=8)
    axis.set_yticks(gammas, [f"{gamma:g}" for gamma in gammas], fontsize=8)
    axis.set_zlim(0, 100)
    axis.tick_params(axis="z", labelsize=8)
    axis.set_xlabel("learning rate", labelpad=8)
    axis.set_ylabel("gamma", labelpad=6)
    axis.set_zlabel("top-1 (%)")
    axis.view_init(elev=28, azim=-58)
    axis.set_box_aspect(None, zoom=0.88)


def _draw_table(axis: Any, rates: Sequence[float], gammas: Sequence[float], grid: Any) -> None:
    axis.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    labels = [f"{gamma:g}" + (" (none)" if gamma == 1 else "") for gamma in gammas]
    axis.set_yticks(range(len(gammas)), labels)
    axis.set_xlabel("learning rate")
    axis.set_ylabel("gamma")
    axis.set_title("top-1 (%)", fontsize=10)
    for (row, column), value in np.ndenumerate(grid):
        colour = "black" if value > 55 else "white"
        axis.text(column, row, f"{value:.1f}", color=colour, ha="center", va="center", fontsize=9)


def main() -> None:
    args = flags().parse_args()
    torch.set_num_threads(1)
    if min(args.gammas) <= 0 or max(args.gammas) > 1 or min(args.rates) <= 0:
        raise UserError(
            f"--gammas must be in (0, 1] and --rates above 0; got {args.gammas} and {args.rates}"
        )
    name = f"lr-gamma-{args.dataset.rpartition('/')[2]}"
    output = output_stem(args.output or RESULTS / name)
    table = output.with_name(output.name + ".csv")
    rows = earlier_rows(args, table)
    cells = list(missing(args, rows))
    done = len(set(args.rates)) * len(set(args.gammas)) - len(cells)
    progress = Progress("Cells", done + len(cells), log_interval=1, done=done)
    for rate, gamma in cells:
        row = train_cell(args, rate, gamma)
        rows.append(row)
        save_csv(rows, table)
        progress.update(1, {"lr": rate, "gamma": gamma, "top1": row["top1"]})
    progress.close()
    facts = {**circumstances("benchmarks.lr_gamma"), "cells": len(rows), **reach(rows)}
    save_json(facts, output.with_name(output.name + ".json"))
    draw(args, rows, output.with_name(output.name + ".png"))
    print(f"Written: {table} and .json, .png beside it")


if __name__ == "__main__":
    run_command(main)
