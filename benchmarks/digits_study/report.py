"""The tables and pictures of the study, from its rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks._record import circumstances
from benchmarks._text import versions
from benchmarks.digits_study.cells import ABLATIONS, CONTROLS, MAIN
from benchmarks.digits_study.pictures import draw_corruptions, draw_differences
from benchmarks.digits_study.runs import FRACTIONS, RESULTS, TUNED_AT, tuned_rates
from benchmarks.digits_study.statistics import Difference, holm, paired_difference
from timm_structdrop.evaluation import PAPER_CORRUPTIONS

Row = Mapping[str, str]
Figure = Callable[[Row], float]

FIGURES: dict[str, Figure] = {
    "clean": lambda row: float(row["test_top1"]),
    "noise": lambda row: float(row["noisy_top1"]),
    "corrupted": lambda row: statistics.fmean(
        float(row[f"{name}_top1"]) for name in PAPER_CORRUPTIONS
    ),
    "PGD": lambda row: 100.0 - float(row["pgd_error"]),
}
BASE = "none"


def write(rows: list[dict[str, str]]) -> None:
    """Write `digits-study.md` and its pictures from the rows of `digits-study.csv`."""
    lines = [
        "# Regularizers on few real digits",
        "",
        "LeNet-5 at 16 px, 600 steps (AdamW 3e-3, one cycle, batch 50, no augmentation) on 20, 10 "
        "and 5 % of 1000 digits of scikit-learn; 360 held-out digits to test on. A seed sets the "
        "split, the subset, the initial weights and the order of the batches; differences are "
        "paired by seed. Rates were chosen on validation images, with seeds of their own, at 10 %. "
        "LeNet-5 has no residual branches, so StochasticDepth is not here. *None, other batches* "
        "is the control of the comparison itself: at 5 % a batch is the whole training set, so "
        "that only rounding tells it from *none*.",
        "",
        "Accuracies in percent: *clean*; *noise*: Gaussian noise of standard deviation 0.4 on "
        "pixels in [0, 1]; *corrupted*: mean over the seven corruptions of DropCluster's paper at "
        "severities 1 to 5; *PGD*: targeted attack, 2 steps of 1/255 in a ball of 5/255. Mean "
        "(standard deviation over seeds); differences with their 95 % interval and p of a paired "
        "t test, adjusted by Holm over all differences of the table. **Bold**: adjusted p < 0.05.",
        "",
        f"`python -m benchmarks.digits_study tune`, then `main`, `ablations`, `report`; "
        f"{_circumstances()}.",
        "",
        "## Rates",
        "",
        *_rates(rows),
    ]
    main = [row for row in rows if row["stage"] == "main"]
    if main:
        lines += _main(main)
        draw_differences(_differences(main, _others()), RESULTS / "digits-study.png")
        draw_corruptions(main, RESULTS / "digits-study-corruptions.png")
    ablations = [row for row in rows if row["stage"] == "ablations"]
    if ablations:
        lines += _ablations(ablations, main)
    (RESULTS / "digits-study.md").write_text("\n".join(lines) + "\n")
    print(f"Wrote {RESULTS / 'digits-study.md'}")


def _circumstances() -> str:
    found = circumstances("benchmarks.digits_study")
    return f"{found['hardware']}; {versions(found)}"


def _others() -> list[str]:
    return [cell.name for cell in MAIN if cell.name != BASE]


def _rates(rows: Sequence[Row]) -> list[str]:
    chosen = tuned_rates(rows)
    lines = ["| regularizer | mean validation accuracy at each rate | chosen |", "|---|---|---|"]
    for cell, rate in chosen.items():
        found: dict[float, list[float]] = {}
        for row in rows:
            if row["stage"] == "tune" and row["cell"] == cell:
                found.setdefault(float(row["rate"]), []).append(float(row["val_top1"]))
        means = ", ".join(f"{r:g}: {statistics.fmean(v):.2f}" for r, v in sorted(found.items()))
        lines.append(f"| {cell} | {means} | {rate:g} |")
    return lines


def by_seed(rows: Iterable[Row], cell: str, fraction: float, figure: Figure) -> dict[int, float]:
    return {
        int(row["seed"]): figure(row)
        for row in rows
        if row["cell"] == cell and float(row["fraction"]) == fraction
    }


def _differences(
    rows: Sequence[Row],
    cells: Sequence[str],
    base: str = BASE,
    fractions: Sequence[float] = FRACTIONS,
) -> dict[tuple[str, float, str], tuple[Difference, float]]:
    """Each cell minus the base with its adjusted p, by (cell, fraction, figure)."""
    found = {
        (cell, fraction, name): paired_difference(
            by_seed(rows, cell, fraction, figure), by_seed(rows, base, fraction, figure)
        )
        for cell in cells
        for fraction in fractions
        for name, figure in FIGURES.items()
    }
    adjusted = holm([difference.p for difference in found.values()])
    return {key: (found[key], p) for key, p in zip(found, adjusted, strict=True)}


def _main(rows: Sequence[Row]) -> list[str]:
    lines = []
    against_none = _differences(rows, _others())
    for fraction in FRACTIONS:
        n = len(by_seed(rows, BASE, fraction, FIGURES["clean"]))
        lines += ["", f"## {1000 * fraction:.0f} training images, n = {n} seeds", ""]
        lines += _header("regularizer")
        lines.append(f"| {BASE} | " + " | ".join(_levels(rows, BASE, fraction)) + " |")
        lines += [_difference_row(cell, fraction, against_none) for cell in _others()]
    lines += [
        "",
        "## Do the clusters matter?",
        "",
        "DropCluster minus what drops something else at the same place, at the same rate and from "
        "the same step on. Positive: the learned clusters are better.",
        "",
        *_header("DropCluster minus"),
    ]
    controls = {cell.name: _differences(rows, ["dropcluster"], cell.name) for cell in CONTROLS}
    pairs = [(name, key, value) for name, found in controls.items() for key, value in found.items()]
    adjusted = holm([difference.p for _, _, (difference, _) in pairs])
    again = {
        (name, key[1], key[2]): (difference, p)
        for (name, key, (difference, _)), p in zip(pairs, adjusted, strict=True)
    }
    for cell in CONTROLS:
        for fraction in FRACTIONS:
            row = _difference_row(cell.name, fraction, again)
            lines.append(row.replace(f"| {cell.name} |", f"| {cell.name}, {fraction:.0%} |", 1))
    return lines


def _ablations(rows: Sequence[Row], main: Sequence[Row]) -> list[str]:
    lines = [
        "",
        f"## Ablations at {1000 * TUNED_AT:.0f} training images",
        "",
        "Each minus its regularizer as above: CamDrop (guided by the class activation map, "
        "n' = C/8), R-Block (SDropDML), DropBlock (block 3, linear schedule, both convolutions). "
        "The rates are those chosen for the regularizer as above, not chosen again.",
        "",
        *_header("ablation"),
    ]
    bases = {"camdrop": "camdrop", "rblock": "rblock sdropdml", "dropblock": "dropblock"}
    together = [*rows, *main]
    found = {
        (cell.name, TUNED_AT, name): paired_difference(
            by_seed(together, cell.name, TUNED_AT, figure),
            by_seed(together, bases[cell.name.partition(":")[0]], TUNED_AT, figure),
        )
        for cell in ABLATIONS
        for name, figure in FIGURES.items()
    }
    adjusted = holm([difference.p for difference in found.values()])
    table = {key: (found[key], p) for key, p in zip(found, adjusted, strict=True)}
    for short, base in bases.items():
        lines.append(f"| **{base}** | " + " | ".join(_levels(main, base, TUNED_AT)) + " |")
        lines += [
            _difference_row(cell.name, TUNED_AT, table)
            for cell in ABLATIONS
            if cell.name.startswith(short)
        ]
    return lines


def _header(first: str) -> list[str]:
    return [f"| {first} | " + " | ".join(FIGURES) + " |", "|---" * (1 + len(FIGURES)) + "|"]


def _levels(rows: Sequence[Row], cell: str, fraction: float) -> list[str]:
    texts = []
    for figure in FIGURES.values():
        values = list(by_seed(rows, cell, fraction, figure).values())
        texts.append(f"{statistics.fmean(values):.2f} ({statistics.stdev(values):.2f})")
    return texts


def _difference_row(
    cell: str,
    fraction: float,
    differences: Mapping[tuple[str, float, str], tuple[Difference, float]],
) -> str:
    texts = []
    for name in FIGURES:
        difference, p = differences[cell, fraction, name]
        text = f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}], p {p:.2g}"
        texts.append(f"**{text}**" if p < 0.05 else text)
    return f"| {cell} | " + " | ".join(texts) + " |"
