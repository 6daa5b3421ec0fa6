"""Write the cards of the packaged checkpoints, with their cluster maps, or say which are stale."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from timm_structdrop.analysis import cluster_layers, cluster_maps, draw_cluster_maps
from timm_structdrop.data import create_dataset
from timm_structdrop.errors import UserError, run_command
from timm_structdrop.files import output_folder, save_png, save_text
from timm_structdrop.hub.card import make_card
from timm_structdrop.models.packaged import packaged
from timm_structdrop.recipes import FlagParser

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

README, PICTURE = "README.md", "clusters.png"
SAMPLES = 2
MARK = "Description"  # of the PNG's text, where the picture says which clusters it shows


def flag_parser() -> FlagParser:
    parser = FlagParser(prog="python -m tools.card", description=__doc__)
    add = parser.add_argument
    add("--output", default="hfcards", metavar="DIR", help="folder of the cards")
    add("--check", action="store_true", help="write nothing; fail if a card is stale")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the cards of the packaged models, or say which are stale."""
    args = flag_parser().parse_flags(argv)
    folder = Path(args.output)
    if args.check:
        stale = [str(path) for path in stale_parts(folder)]
        if stale:
            raise UserError(
                "cards must say what the packaged checkpoints are (python -m tools.card writes "
                f"them); stale: {', '.join(stale)}"
            )
        print(f"the {len(packaged())} cards in {folder} are current")
        return
    output_folder(folder)
    written = list(write_stale(folder))
    for path in written:
        print(path)
    print(f"{len(written)} files written, {len(packaged())} cards in {folder}")


def stale_parts(folder: Path) -> Iterator[Path]:
    """The files of `folder` that are missing, say something else than the packaged checkpoints, or
    belong to none."""
    names = {facts["name"]: model for model, facts in packaged().items()}
    for name, model_name in names.items():
        model = _model(name)
        if not _same_card(folder / name / README, packaged_card(model_name, model)):
            yield folder / name / README
        if cluster_layers(model) and _picture_mark(folder / name / PICTURE) != _mark(model):
            yield folder / name / PICTURE
    if folder.is_dir():
        yield from (path for path in sorted(folder.iterdir()) if path.name not in names)


def write_stale(folder: Path) -> Iterator[Path]:
    """Write what `stale_parts` names; what belongs to no checkpoint is left alone."""
    for path in list(stale_parts(folder)):
        name = path.parent.name
        model_name = name.partition(".")[0]
        if path.name not in (README, PICTURE) or model_name not in packaged():
            continue
        output_folder(path.parent)
        model = _model(name)
        if path.name == README:
            save_text(str(packaged_card(model_name, model)), path)
        else:
            draw_picture(model, path)
        yield path


def packaged_card(model_name: str, model: nn.Module) -> ModelCard:
    """The card of a packaged checkpoint; the comparison is with the others on the same data."""
    facts = packaged()[model_name]
    rows = [
        {
            "model": other["name"],
            "top1": other["top1"],
            "n": other["n_eval"],
            "params": other["params"],
        }
        for other in packaged().values()
        if (other["dataset"], other["split"]) == (facts["dataset"], facts["split"])
    ]
    comparison = rows if len(rows) > 1 else []
    return make_card(model, license=facts["license"], facts={**facts, "comparison": comparison})


def draw_picture(model: nn.Module, path: Path) -> None:
    """The cluster maps with sample images, in a PNG that says which clusters they are.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    facts = packaged()[model.pretrained_cfg["architecture"]]  # type: ignore[index]
    config = resolve_model_data_config(model)
    mode = "RGB" if config["input_size"][0] == 3 else "L"
    dataset = create_dataset(facts["dataset"], None, facts["split"], input_img_mode=mode)
    transform = create_transform(**config, is_training=False)
    images = torch.stack([transform(dataset[index][0]) for index in range(SAMPLES)])
    maps = cluster_maps(model, images, SAMPLES)[0]
    save_png(draw_cluster_maps(maps, facts["name"]), path, {MARK: _mark(model)})


def _model(name: str) -> Any:
    return timm.create_model(name, pretrained=True).eval()


def _same_card(path: Path, card: ModelCard) -> bool:
    """Whether the file says the same; how the metadata are written may differ with the library."""
    from huggingface_hub import ModelCard

    if not path.is_file():
        return False
    try:
        there = ModelCard(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return there.text == card.text and there.data.to_dict() == card.data.to_dict()


def _mark(model: nn.Module) -> str:
    """What the clusters of the model's layers are, in few characters."""
    digest = hashlib.sha256()
    for layer in cluster_layers(model).values():
        digest.update(layer.labels.numpy().tobytes() + layer.structured.numpy().tobytes())
    return f"clusters {digest.hexdigest()}"


def _picture_mark(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            return image.info.get(MARK)
    except OSError:
        return None


if __name__ == "__main__":
    run_command(main)
