"""CamDrop's bound on the gradients of biases, Eq. (16), measured on a trained model.

    python -m benchmarks.gradient_bound [--checkpoint RUN] [--num-images N] [--draws N]

Without a checkpoint, ResNet-8 is trained on scikit-learn's digits at 32 px first, where the maps of
its groups are those of the paper's ResNet-110 on CIFAR-10 (about a minute on one core). At each
convolution the norms ||dS/db||_1 of each image and bias are taken without a mask, with dropout's
and with CamDrop's, gamma 0.9 and r = 8 as in the paper; once with masks as in Eq. (12), from which
the bound is derived, and once with what is kept rescaled, as the layers do (Eqs. 2 and 10).
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks._record import ROOT, circumstances, quietly_trained
from timm_structdrop.analysis import find_places, gradient_bound, save_json
from timm_structdrop.commands._images import Subject, add_subject_flags, load_subject
from timm_structdrop.errors import UserError, run_command
from timm_structdrop.training import Progress, write_whole

TRAINING = (
    "--dataset digits --num-classes 10 --in-chans 1 --img-size 32 --epochs 10 --batch-size 32 "
    "--opt adamw --lr 0.003 --weight-decay 0.01 --warmup-epochs 1 --sched-on-updates --smoothing 0 "
    "--shift 1 --scale 1 1 --ratio 1 1 --hflip 0 --color-jitter 0 --train-interpolation bilinear "
    "--workers 0"
)


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="resnet8", metavar="NAME", help="resnet8 if not given")
    add("--checkpoint", metavar="RUN", help="a run of train.py, instead of training the model here")
    add("--num-images", type=int, default=100, metavar="N", help="validation images (100)")
    add("--seed", type=int, default=42, metavar="S", help="of images and masks (42)")
    add("--keep-prob", type=float, default=0.9, metavar="P", help="gamma (0.9)")
    add("--block-size", type=int, default=8, metavar="N", help="r of CamDrop (8)")
    add("--draws", type=int, default=4, metavar="N", help="masks of each kind (4)")
    add(
        "--output",
        default=str(ROOT / "benchmarks" / "results" / "gradient-bound"),
        metavar="PATH",
        help="without .json and .md (benchmarks/results/gradient-bound)",
    )
    return parser


def measure(args: argparse.Namespace, subject: Subject) -> Iterator[dict[str, Any]]:
    """The figures of each place, with and without rescaling."""
    places = find_places(subject.model, tuple(subject.images.shape[2:]), "convs")
    progress = Progress("Gradient bound", 2 * len(places), log_interval=1)
    for rescale in (False, True):
        for place in places:
            found = gradient_bound(
                subject.model, subject.images, subject.targets, place, keep_prob=args.keep_prob,
                block_size=args.block_size, rescale=rescale, draws=args.draws, seed=args.seed,
            )  # fmt: skip
            progress.update(len(subject.images), {})
            yield {"rescaled": rescale, **found.numbers()}
    progress.close()


def trained_subject(args: argparse.Namespace) -> Subject:
    """The model of the run, or of one on the digits, and validation images of its data set."""
    parser = argparse.ArgumentParser()
    add_subject_flags(parser, split="validation", num_images=args.num_images)
    with tempfile.TemporaryDirectory() as folder:
        run = args.checkpoint or quietly_trained(
            Path(folder) / "run", [*TRAINING.split(), "--model", args.model]
        )
        flags = [args.model, "--checkpoint", str(run), "--seed", str(args.seed)]
        return load_subject(parser.parse_args(flags))


def report(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    facts = results["subject"]
    lines = [
        "# The gradient bound of CamDrop, Eq. (16)",
        "",
        f"`{results['command']}`: {facts['model']} trained on {facts['dataset']}, "
        f"{results['top1']:.1f} % of the {facts['num_images']} {facts['split']} images right; "
        f"gamma {results['keep_prob']:g}, r = {results['block_size']}, {results['draws']} masks of "
        f"each kind; {results['hardware']}; "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ".",
        "",
        "The paper: |dL/db| <= ||dS/db||(CamDrop) <= ||dS/db||(dropout) <= ||dS/db||. Each cell is "
        "the ratio of the means of the smaller to the larger norm, over images, biases and masks, "
        "then the verdict on the difference of the means (two standard errors over the images), "
        "then the share of single comparisons that hold.",
    ]
    for rescaled in (False, True):
        how = "kept units rescaled, as the layers do" if rescaled else "masks as in Eq. (12)"
        rows, header = [], ["place", "mean norm +- std", "dropped (CamDrop)"]
        for found in results["places"]:
            if found["rescaled"] != rescaled:
                continue
            none, camdrop = found["masks"]["none"], found["masks"]["camdrop"]
            row = [found["place"], f"{none['mean_norm']:.3f} +- {none['std_over_images']:.3f}"]
            row.append(f"{100 * camdrop['dropped']:.2f} %")
            for claim in found["claims"]:
                row.append(
                    f"{claim['ratio']:.3f}, {claim['verdict']}, {100 * claim['share_holds']:.0f} %"
                )
            rows.append(row)
        header += [f"{claim['smaller']} <= {claim['larger']}" for claim in found["claims"]]
        lines += ["", f"## {how[0].upper()}{how[1:]}", "", *markdown(header, rows)]
        lines += ["", "In the mean: " + "; ".join(verdicts(results["places"], rescaled)) + "."]
    bounded = min(
        mask["share_bounded"] for found in results["places"] for mask in found["masks"].values()
    )
    lines += [
        "",
        f"Eq. (15), |dL/db| <= ||dS/db||: in at least {100 * bounded:.1f} % of all cases.",
    ]
    return "\n".join(lines) + "\n"


def verdicts(places: list[dict[str, Any]], rescaled: bool) -> list[str]:
    """At how many places each inequality holds."""
    found = [place for place in places if place["rescaled"] == rescaled]
    words = []
    for index, claim in enumerate(found[0]["claims"]):
        said = [place["claims"][index]["verdict"] for place in found]
        words.append(
            f"{claim['smaller']} <= {claim['larger']} holds at {said.count('holds')} and fails at "
            f"{said.count('fails')} of {len(said)} places"
        )
    return words


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def main() -> None:
    args = flags().parse_args()
    torch.set_num_threads(1)
    output = Path(args.output)
    if not output.parent.is_dir():
        raise UserError(f"--output must be in a folder that is there; got {args.output}")
    subject = trained_subject(args)
    with torch.no_grad():
        device = next(subject.model.parameters()).device
        right = subject.model(subject.images.to(device)).argmax(1).cpu() == subject.targets
    facts = {name: fact for name, fact in subject.facts.items() if name != "weights"}
    results = {
        **circumstances("benchmarks.gradient_bound"),
        "subject": facts,
        "training": args.checkpoint or f"train.py {TRAINING} --model {args.model}",
        "top1": 100 * float(right.double().mean()),
        "keep_prob": args.keep_prob,
        "block_size": args.block_size,
        "draws": args.draws,
        "places": list(measure(args, subject)),
    }
    save_json(results, output.with_suffix(".json"))
    text = report(results)
    write_whole(output.with_suffix(".md"), lambda file: file.write(text.encode()))
    print(text)


if __name__ == "__main__":
    run_command(main)
