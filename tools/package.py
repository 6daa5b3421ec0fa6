"""Package a training's checkpoint: weights in half precision, and a JSON file of the facts.

The accuracy recorded is that of the file as it is written, on all images of the evaluated split.
`python -m tools.card` makes the card from it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.data import create_loader, resolve_model_data_config
from torch import Tensor, nn

from timm_structdrop.analysis import cluster_places, hopkins_report
from timm_structdrop.cli._images import Subject, add_subject_flags, load_subject
from timm_structdrop.data import class_names, create_dataset
from timm_structdrop.errors import UserError, nearest, one_line, run_command
from timm_structdrop.evaluation import evaluate
from timm_structdrop.files import output_folder, save_json
from timm_structdrop.hub.export import file_sha256
from timm_structdrop.hub.licenses import check_license
from timm_structdrop.models.packaged import FOLDER, packaged_cfg
from timm_structdrop.models.structdrop_variants import variants
from timm_structdrop.models.weights import read_checkpoint
from timm_structdrop.recipes import FlagParser
from timm_structdrop.recipes.trained import training_facts
from timm_structdrop.version import __version__
from timm_structdrop.words import counted

LIBRARIES = ("torch", "timm", "numpy", "scikit-learn")
HOPKINS_IMAGES = 64
BN_KEYS = ("bn_momentum", "bn_eps")  # flags that are settings of the model


def flag_parser() -> FlagParser:
    parser = FlagParser(prog="python -m tools.package", description=__doc__)
    add = parser.add_argument
    add("training", metavar="RUN", help="output folder of a training, or a checkpoint")
    add("--use-ema", action="store_true", help="its averaged weights")
    add("--tag", default="digits", metavar="NAME", help="pretrained tag of the weights")
    add("--license", default="apache-2.0", metavar="ID", help="of the weights, as the Hub names it")
    add("--hardware", metavar="TEXT", help="what it was trained on; this machine if not given")
    add("--output", metavar="DIR", help="folder of the two files; the package's if not given")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Put a trained model and the facts about it into the package."""
    args = flag_parser().parse_flags(argv)
    check_license(args.license)
    checkpoint = read_checkpoint(args.training, args.use_ema)
    name, trained = checkpoint.arch or "", checkpoint.args
    if name not in variants:
        raise UserError(
            f"a packaged checkpoint must be of a variant; {checkpoint.path} holds "
            f"{name or 'an unnamed model'}{nearest(name, variants)}"
        )
    if not trained:
        raise UserError(
            f"a packaged checkpoint needs the args.yaml of its run; {args.training} has none"
        )
    if not trained.get("dataset"):
        raise UserError(
            "a packaged checkpoint must be of a data set that everybody has by its name, such as "
            f"digits; {args.training} was trained on a folder"
        )
    folder = output_folder(args.output or FOLDER)
    subject = load_subject(_subject_flags(name, args))
    facts = {
        **model_facts(subject, trained),
        "tag": args.tag,
        "name": f"{name}.{args.tag}",
        "license": args.license,
        **training_facts(trained),
        **circumstances(trained, args.hardware),
    }
    with tempfile.TemporaryDirectory(prefix="package-", dir=folder) as temporary:
        weights = Path(temporary) / f"{name}.safetensors"
        write_weights(subject.model.state_dict(), weights)
        facts |= {"sha256": file_sha256(weights), "size": weights.stat().st_size}
        facts |= file_figures(name, facts, weights)
        save_json(facts, Path(temporary) / f"{name}.json")
        # safetensors makes files that only their owner can read
        shutil.copymode(Path(temporary) / f"{name}.json", weights)
        for suffix in ("safetensors", "json"):
            os.replace(Path(temporary) / f"{name}.{suffix}", folder / f"{name}.{suffix}")
    print(
        f"{folder / name}.safetensors: {facts['size'] / 1e6:.2f} MB, top-1 {facts['top1']:.2f} % "
        f"({facts['n_correct']} of {facts['n_eval']})"
    )


def _subject_flags(name: str, args: argparse.Namespace) -> argparse.Namespace:
    parser = FlagParser()
    add_subject_flags(parser, split="validation", num_images=HOPKINS_IMAGES)
    ema = ["--use-ema"] if args.use_ema else []
    return parser.parse_flags([name, "--checkpoint", args.training, "--device", "cpu", *ema])


def model_facts(subject: Subject, trained: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is, and what there is to say of its activations."""
    model: Any = subject.model
    with torch.no_grad():
        pool_size = model.forward_features(subject.images[:1]).shape[-2:]
    given = dict(trained.get("model_kwargs") or {})
    given |= {key: trained[key] for key in BN_KEYS if trained.get(key) is not None}
    facts = {
        "model": subject.name,
        "model_args": {key: value for key, value in given.items() if key != "img_size"},
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "num_classes": model.num_classes,
        "data": {**subject.data, "pool_size": list(pool_size)},
    }
    if cluster_places(model):
        report = hopkins_report(model, subject.images)
        facts["hopkins"] = {
            layer.name: round(float(layer.per_channel.double().mean()), 4)
            for layer in report.layers
        }
    return facts


def circumstances(trained: Mapping[str, Any], hardware: str | None) -> dict[str, Any]:
    """Where the checkpoint was trained, at what rate, and how it was chosen."""
    epochs = int(trained.get("epochs") or 0)
    metric = {"top1": "top-1", "top5": "top-5"}.get(trained.get("eval_metric", "top1"), "loss")
    selection = f"the best of {counted(epochs, 'epoch')} by {metric} on these images"
    evaluated = trained.get("val_split", "validation")
    return {
        "drop_prob": trained.get("drop_block"),
        "hardware": hardware or f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            **{library: version(library) for library in LIBRARIES},
            "timm_structdrop": __version__,
        },
        "split": evaluated or "validation",
        "selection": selection if evaluated else None,  # these images had no say in it
    }


def write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Floating point in half precision, everything else as it is.

    Raises:
        UserError: a weight is beyond the range of half precision, or the file cannot be written.
    """
    halved = {}
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        halved[key] = value.half() if value.is_floating_point() else value.clone()
        if value.is_floating_point() and not bool(halved[key].isfinite().all()):
            raise UserError(f"weights must be within half precision, up to 65504; {key} is not")
    try:
        save_file(halved, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"{path} cannot be written: {one_line(error)}") from error


def file_figures(name: str, facts: Mapping[str, Any], weights: Path) -> dict[str, Any]:
    """Accuracy of the file on the evaluated split, loaded and fed as a user does it."""
    base = dict(variants[name].architecture.cfg)
    dataset = create_dataset(
        facts["dataset"],
        None,
        facts["split"],
        input_img_mode="RGB" if facts["data"]["input_size"][0] == 3 else "L",
    )
    names = class_names(dataset) or range(facts["num_classes"])
    known = {**facts, "label_names": [str(label) for label in names]}
    model: nn.Module = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg=packaged_cfg(known, base, weights).to_dict(),
        img_size=facts["data"]["input_size"][-2:],
        **facts["model_args"],
    )
    config = resolve_model_data_config(model)
    loader = create_loader(
        dataset, batch_size=32, use_prefetcher=False, num_workers=0, **_loading(config)
    )
    found = evaluate(model, loader)
    return {
        "label_names": known["label_names"],
        "n_eval": found["samples"],
        "n_correct": round(found["top1"] * found["samples"] / 100),
        "top1": round(found["top1"], 4),
        "top5": round(found["top5"], 4),
    }


def _loading(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: config[key]
        for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    }


if __name__ == "__main__":
    run_command(main)
