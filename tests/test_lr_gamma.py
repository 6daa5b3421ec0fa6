"""The sweep of learning rate and gamma: its cells, going on after a stop, and its picture."""

import csv
import json
import sys

import pytest
import torch
from test_analysis import overlaps

from benchmarks import lr_gamma
from benchmarks.lr_gamma import draw_accuracy_surface
from timm_structdrop.errors import UserError


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Runs the sweep on ResNet-8 and two rates; returns the rows of its file."""
    threads = torch.get_num_threads()

    def run(*flags):
        argv = ["--model", "resnet8", "--epochs", "1", "--batch-size", "8", "--img-size", "16",
                "--rates", "0.03", "1e30", "--gammas", "1", "0.8", "--output",
                str(tmp_path / "sweep")]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["lr_gamma", *argv, *flags])
        lr_gamma.main()
        return list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))

    yield run
    torch.set_num_threads(threads)


def test_a_sweep_goes_on_where_it_was_stopped(sweep, tmp_path, monkeypatch):
    trained = []
    plain = lr_gamma.train_cell

    def counted(args, rate, gamma):
        trained.append((rate, gamma))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return plain(args, rate, gamma)

    monkeypatch.setattr(lr_gamma, "train_cell", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep()
    rows = sweep()
    cells = [(0.03, 1.0), (1e30, 1.0), (0.03, 0.8), (1e30, 0.8)]
    assert trained == [*cells[:3], *cells[2:]]
    assert [(float(row["lr"]), float(row["gamma"])) for row in rows] == cells
    for row in rows:
        diverged = float(row["lr"]) > 1
        assert (row["train_loss"] == "not finite") == diverged
        assert (float(row["top1"]) == 10.0) == diverged  # chance
    assert float(rows[0]["top1"]) > 20
    assert rows[0]["train_loss"] != rows[2]["train_loss"]  # CamDrop did something
    facts = json.loads((tmp_path / "sweep.json").read_text())
    best = float(rows[0]["top1"])
    reached = 0.03 if best > 50 else None
    assert facts["by_gamma"]["1"] == {"best_top1": best, "largest_rate_above_50": reached}
    assert facts["cells"] == 4 and facts["command"].startswith("python -m benchmarks.lr_gamma")
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    assert sweep() == rows and len(trained) == 5
    with pytest.raises(UserError, match=r"--epochs must be that .* sweep.csv, 1; got 2"):
        sweep("--epochs", "2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gammas", "1.5"], r"--gammas must be in \(0, 1\]"),
        (["--output", "/nowhere/x"], "in a folder that is there; got /nowhere/x"),
        (["--dataset", "digitz"], "unknown dataset 'digitz'"),
    ],
)
def test_bad_input(sweep, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        sweep(*flags)
    assert list(tmp_path.iterdir()) == []


def test_the_picture_has_every_figure_in_its_place():
    top1 = {(rate, gamma): rate + 50 * gamma for rate in (0.03, 0.1, 15.0) for gamma in (1.0, 0.5)}
    figure = draw_accuracy_surface(top1, "CamDrop (r = 3) on resnet8, digits at 16 px: top-1")
    assert overlaps(figure) == []
    surface, table = figure.axes
    texts = {tuple(map(round, text.get_position())): text.get_text() for text in table.texts}
    rows = [label.get_text() for label in table.get_yticklabels()]
    columns = [label.get_text() for label in table.get_xticklabels()]
    assert rows == ["1 (none)", "0.5"] and columns == ["0.03", "0.1", "15"]
    assert texts[2, 1] == "40.0" and texts[0, 0] == "50.0"
    assert surface.get_zlabel() == "top-1 (%)"
