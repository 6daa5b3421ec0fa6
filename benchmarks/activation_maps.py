"""Whether class activation maps are more spread with CamDrop, as its paper's Fig. 3 says.

    python -m benchmarks.activation_maps [--seeds N]

ResNet-8 on scikit-learn's digits at 16 px, trained as in benchmarks.defaults (about ten minutes on
one core). The measure is the area of a map above half its maximum, in the last group's 4 x 4 maps
of the true class, mean over the 360 held-out digits; differences to a plain network are of equal
seeds.
"""

import argparse
import statistics
from typing import Any

import torch

from benchmarks._record import add_output, circumstances, output_stem, write_study
from benchmarks._text import table, versions
from benchmarks.defaults import LETTER, Cell, digits, train
from timm_structdrop.analysis import cam_place, class_activation_maps
from timm_structdrop.errors import run_command
from timm_structdrop.training import Progress

PLAIN = "no regularizer"
OFTEN = {"keep_prob": 0.5, "block_size": 4}
CELLS = (
    Cell(PLAIN),
    Cell("DropBlock, its defaults", "resnet8_dropblock"),
    Cell("CamDrop, its defaults", "resnet8_camdrop"),
    Cell("CamDrop, gamma 0.5, block 4", "resnet8_camdrop", OFTEN),
    Cell("the letter, gamma 0.5, block 4", "resnet8_camdrop", {**OFTEN, **LETTER}),
    Cell(
        "the letter, predicted classes, gamma 0.5, block 4",
        "resnet8_camdrop",
        {**OFTEN, **LETTER, "guide": "predicted"},
    ),
)


def area(cell: Cell, seed: int) -> dict[str, Any]:
    """The mean area over the held-out digits, and how many of them are right."""
    model, _ = train(cell, seed)
    images, classes = digits(False)
    cams = class_activation_maps(model, images, classes, cam_place(model, (16, 16)))
    found = cams.numbers()
    return {
        "row": cell.row,
        "seed": seed,
        "area": found["area"]["mean"],
        "top1": 100.0 * found["n_correct"] / found["n_images"],
    }


def report(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    runs = results["runs"]
    plain = {run["seed"]: run["area"] for run in runs if run["row"] == PLAIN}
    rows = []
    for name in dict.fromkeys(run["row"] for run in runs):
        of_row = [run for run in runs if run["row"] == name]
        differences = [run["area"] - plain[run["seed"]] for run in of_row]
        row = [name, f"{statistics.fmean(run['top1'] for run in of_row):.1f}"]
        row.append(f"{statistics.fmean(run['area'] for run in of_row):.3f}")
        if name != PLAIN and len(differences) > 1:
            mean, spread = statistics.fmean(differences), statistics.stdev(differences)
            row.append(f"{mean:+.3f} ({spread:.3f})")
        rows.append(row + [""] * (4 - len(row)))
    lines = [
        "# The area of class activation maps",
        "",
        f"`{results['command']}`: the part of the last map above half its maximum, ResNet-8 on "
        f"scikit-learn's digits at 16 px, {len(plain)} seeds. Differences are paired by seed: mean "
        f"(standard deviation over seeds). {results['hardware']}; {versions(results)}.",
        "",
        *table(["regularizer", "top-1", "area", "difference to none"], rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="trainings a row (10)")
    add_output(parser, "activation-maps")
    args = parser.parse_args()
    output = output_stem(args.output)
    torch.set_num_threads(1)
    runs = []
    progress = Progress("Trainings", len(CELLS) * args.seeds, log_interval=1)
    for seed in range(args.seeds):
        for cell in CELLS:
            runs.append(area(cell, seed))
            progress.update(1, {"area": runs[-1]["area"]})
    progress.close()
    results = {**circumstances("benchmarks.activation_maps"), "runs": runs}
    write_study(results, report(results), output)


if __name__ == "__main__":
    run_command(main)
