"""The table of the trained defaults: what is committed is what its numbers say, and all of it."""

import json

import numpy as np
from script import ROOT

from benchmarks import activation_maps, defaults
from timm_structdrop.layers import regularizers

RESULTS = ROOT / "benchmarks" / "results"


def test_the_committed_table():
    results = json.loads((RESULTS / "defaults.json").read_text())
    assert defaults.report(results) == (RESULTS / "defaults.md").read_text()
    rows = {run["row"] for run in results["runs"]}
    assert rows == {cell.row for cell in defaults.CELLS}
    assert {f"{name}, its defaults" for name in regularizers} <= rows
    assert len(defaults.digits(True).images) == 1437


def test_each_row_has_every_seed():
    results = json.loads((RESULTS / "defaults.json").read_text())
    seeds = {run["seed"] for run in results["runs"]}
    assert len(seeds) == 10
    assert len(results["runs"]) == len(seeds) * len(defaults.CELLS)


def test_what_the_pages_quote():
    """The figures of README and docs/results.md, as the table rounds them."""
    runs = json.loads((RESULTS / "defaults.json").read_text())["runs"]

    def mean(row, key="top1", places=1):
        values = [run[key] for run in runs if run["row"] == row]
        return f"{np.mean(values):.{places}f}"

    quoted = " ".join((ROOT / "docs" / "results.md").read_text().split())
    for name, columns in (
        ("camdrop, the letter", ("top1", "true_label", "wrong_label")),
        ("camdrop, authors' reading", ("top1", "wrong_label")),
        ("the letter, predicted classes", ("top1", "wrong_label")),
        ("the letter, random classes", ("top1",)),
        ("the letter, averages", ("top1",)),
    ):
        for column in columns:
            found = [mean(f"{name}, gamma {gamma}", column) for gamma in (0.9, 0.7, 0.5)]
            found = [value.replace("100.0", "100") for value in found]
            said = f"{found[0]}, {found[1]} and {found[2]} %"
            assert said in quoted, (name, column, said)
    losses = [mean(f"camdrop, the letter, gamma {g}", "train_loss", 3) for g in (0.9, 0.7, 0.5)]
    assert f"{losses[0]}, {losses[1]} and {losses[2]}" in quoted
    assert f"{mean('no regularizer', 'train_loss', 3)} without CamDrop" in quoted
    tops = [float(mean(f"{name}, its defaults")) for name in regularizers]
    assert f"regularizer {min(tops)} to {max(tops)} %" in quoted
    readme = " ".join((ROOT / "README.md").read_text().split())
    for name, rest in (("the letter", " of held-out digits"), ("authors' reading", "")):
        found = [mean(f"camdrop, {name}, gamma {g}") for g in (0.9, 0.7, 0.5)]
        assert f"{found[0]}, {found[1]} and {found[2]} %{rest}" in readme
    assert f"without CamDrop has {mean('no regularizer')} %" in readme


def test_the_committed_table_of_activation_maps():
    results = json.loads((RESULTS / "activation-maps.json").read_text())
    assert activation_maps.report(results) == (RESULTS / "activation-maps.md").read_text()
    assert {run["row"] for run in results["runs"]} == {cell.row for cell in activation_maps.CELLS}
