"""Model cards: what the Hub shows of a checkpoint, from the model and its recorded facts.

`card.md.jinja` is the card; what it says of a checkpoint is found out here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import nn

from timm_structdrop.errors import UserError
from timm_structdrop.hub.citations import bibtex, in_words, paper_line
from timm_structdrop.hub.licenses import check_license
from timm_structdrop.hub.model_stats import (
    RegularizerUse,
    architecture_name,
    fitted_clusters,
    model_stats,
    regularizer_uses,
)
from timm_structdrop.layers import regularizers
from timm_structdrop.models.placement import where_in_words
from timm_structdrop.models.structdrop_variants import variants

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

__all__ = ["make_card", "updated_readme"]

TEMPLATE = Path(__file__).with_name("card.md.jinja")
TASK = "image-classification"
READERS = ("hfds/", "hfids/", "tfds/", "torch/", "wds/")  # timm's prefixes of data set names
SMALL_TEST = 5000  # fewer images do not rank models that are close
MOST_LABELS = 20  # more of them are not listed

START = "<!-- timm_structdrop writes this part again at every push -->"
END = "<!-- end of the part that timm_structdrop writes -->"
METADATA = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def make_card(
    model: nn.Module,
    *,
    license: str,
    repo_id: str | None = None,
    title: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> ModelCard:
    """The card of a checkpoint.

    Everything in it is read off the model or comes from `facts`; what is not known is left out.

    Args:
        model: with the checkpoint's weights and a `pretrained_cfg`; it runs once, on a zero image.
        license: the Hub's identifier of the license, such as `apache-2.0`.
        repo_id: `user/name` on the Hub.
        title: heading; by default the name under which the weights load.
        facts: provenance, all keys optional. `name`: what `timm.create_model` loads these weights
            by without the Hub. `command`, `recipe`, `recipe_note` (a sentence), `seed`, `epochs`,
            `drop_prob`, `hardware`, `versions` (by library): of the training. `dataset` (the data
            set as train.py names it), `dataset_name` (in words), `split`, `n_eval`, `top1`, `top5`
            (percent), `selection` (how the checkpoint was chosen): of the evaluation. `hopkins`:
            mean Spatial Hopkins statistic by layer. `comparison`: rows of `model`, `top1`, `n` and,
            if known, `params`. `label_names`, `sha256`, `base_model` (repository the training
            started from), `rate_saved` (whether the drop rate comes back with the weights).
            `picture`: file name of the cluster maps, `clusters.png` unless it says otherwise; None
            for no picture.

    Returns:
        A `huggingface_hub.ModelCard`; `str()` of it is the README.

    Raises:
        UserError: the license is none of the Hub's, or a figure is not a number in [0, 100].
    """
    from huggingface_hub import ModelCard, ModelCardData

    known = dict(facts or {})
    license = check_license(license)
    uses = regularizer_uses(model)
    name = known.get("name") or (repo_id or architecture_name(model)).rpartition("/")[2]
    dataset = dataset_id(known.get("dataset"))
    results = eval_results(known, dataset)
    data = ModelCardData(
        license=license,
        library_name="timm",
        pipeline_tag=TASK,
        tags=[TASK, "timm", "timm_structdrop", *(use.name for use in uses)],
        datasets=[dataset] if dataset else None,
        base_model=known.get("base_model"),
        model_name=name if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title or name,
        license=license,
        repo_id=repo_id,
        loads_by=known.get("name") or (f"hf-hub:{repo_id}" if repo_id else "local-dir:."),
        dataset=known.get("dataset_name") or known.get("dataset"),
        shows_digits=known.get("dataset") == "digits",
        **facts_of_model(model, uses, known),
        regularizers=[facts_of_regularizer(model, use, known) for use in uses],
        training=facts_of_training(known),
        **facts_of_evaluation(known),
        picture=known.get("picture", "clusters.png"),
        bibtex=bibtex(use.name for use in uses),
        facts=known,
    )


def dataset_id(dataset: object) -> str | None:
    """The data set's identifier for the Hub: its name without the prefix of timm's reader."""
    if not isinstance(dataset, str):
        return None
    for reader in READERS:
        dataset = dataset.removeprefix(reader)
    return dataset or None


def eval_results(facts: Mapping[str, Any], dataset: str | None) -> list[EvalResult]:
    """The figures of `facts` for the card's model-index, in percent.

    Raises:
        UserError: one is not a number in [0, 100].
    """
    from huggingface_hub import EvalResult

    found = []
    for key, words in (("top1", "Top-1 accuracy"), ("top5", "Top-5 accuracy")):
        value = facts.get(key)
        if value is None:
            continue
        if not isinstance(value, int | float) or not 0.0 <= value <= 100.0:
            raise UserError(f"{key} must be a percentage in [0, 100]; got {value!r}")
        if dataset is None:
            continue
        found.append(
            EvalResult(
                task_type=TASK,
                task_name="Image classification",
                dataset_type=dataset,
                dataset_name=str(facts.get("dataset_name") or dataset),
                dataset_split=facts.get("split"),
                metric_type="accuracy" if key == "top1" else "top-5-accuracy",
                metric_name=words,
                metric_value=round(float(value), 4),
            )
        )
    return found


def facts_of_model(
    model: nn.Module, uses: Sequence[RegularizerUse], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What the model is, what it costs, and what its code blocks depend on."""
    stats = model_stats(model)
    channels, height, width = stats.input_size
    name = architecture_name(model)
    variant = variants.get(name)
    base = getattr(model, "_model_args", {}).get("base", name)
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    ids = cfg.get("paper_ids") or ()
    ids = (ids,) if isinstance(ids, str) else ids
    labels = facts.get("label_names") or ()
    return {
        "architecture": name,
        "architecture_in_words": variant.architecture.summary if variant is not None else base,
        "params": _short(stats.params / 1e6),
        "gmacs": _short(stats.macs / 1e9),
        "activations": _short(stats.activations / 1e6),
        "height": height,
        "width": width,
        "colours": {1: " gray", 3: " RGB"}.get(channels, f" {channels}-channel"),
        "image_mode": "L" if channels == 1 else "RGB",
        "num_classes": int(getattr(model, "num_classes", 0)),
        "labels": labels if len(labels) <= MOST_LABELS else (),
        "papers": [
            *(paper_line(use.name) for use in uses),
            *(f"https://arxiv.org/abs/{id.removeprefix('arXiv:')}" for id in ids),
        ],
        "feature_shapes": stats.feature_shapes,
        "map_shape": stats.map_shape,
        "embedding": stats.embedding,
    }


def facts_of_regularizer(
    model: nn.Module, use: RegularizerUse, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Where the regularizer sits, its settings, what it has learned."""
    paths = list(use.layers)
    shown = ", ".join(f"`{path}`" for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
    rate = facts.get("drop_prob")
    rows = {"rate in training": [rate]} if rate is not None else {}
    rows |= {f"`{key}`": values for key, values in use.settings.items() if values != [None]}
    clusters = [
        {
            "path": path,
            "n_clusters": layer.n_clusters,
            "channels": len(layer.structured),
            "masked": int((~layer.structured).sum()),
            "height": layer.labels.shape[1],
            "width": layer.labels.shape[2],
        }
        for path, layer in fitted_clusters(use).items()
    ]
    return {
        "name": in_words(use.name),
        "summary": regularizers[use.name].summary,
        "layers": f"{len(paths)} layers ({shown})" if len(paths) > 1 else f"one layer ({shown})",
        "where": where_in_words(model, use.name),
        "settings": {key: _values(values) for key, values in rows.items()},
        "clusters": clusters,
        "awaits_clusters": not clusters and bool(use.settings.get("n_clusters")),
    }


def facts_of_training(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The rows below the command."""
    rows = {key: facts.get(key) for key in ("recipe", "epochs", "seed", "hardware")}
    versions = facts.get("versions") or {}
    rows["versions"] = ", ".join(f"{name} {is_}" for name, is_ in versions.items()) or None
    return {key: value for key, value in rows.items() if value is not None}


def facts_of_evaluation(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The figures, as text; what the others reach, best first; and what one image is worth where
    images are few."""
    top1, top5 = facts.get("top1"), facts.get("top5")
    rows = sorted(facts.get("comparison") or (), key=lambda row: (-row["top1"], row["model"]))
    smallest = min((row["n"] for row in rows), default=SMALL_TEST)
    return {
        "top1": None if top1 is None else f"{top1:.2f}",
        "top5": None if top5 is None else f"{top5:.2f}",
        "comparison": [
            {
                "model": row["model"],
                "top1": f"{row['top1']:.2f}",
                "n": row["n"],
                "params": _short(row["params"] / 1e6) if "params" in row else "",
            }
            for row in rows
        ],
        "points_of_an_image": f"{100 / smallest:.2f}" if smallest < SMALL_TEST else None,
    }


def _short(value: float) -> str:
    """One decimal, as timm's cards; of a small value the first two digits."""
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _values(values: Sequence[Any]) -> str:
    return " or ".join("none" if value is None else json.dumps(value) for value in values)


def updated_readme(existing: str | None, card: str) -> str:
    """The README to push.

    The card's metadata are laid over the existing ones (tags of both stay). Its text takes the
    place of the card that was pushed before; a README without one keeps its text below the card.

    Args:
        existing: the README in the repository; None where there is none.
        card: metadata between ``---`` lines, and text.
    """
    data, body = _split(card)
    written = f"{START}\n\n{body.strip()}\n\n{END}"
    before, text = _split(existing or "")
    tags = [*_strings(data.get("tags")), *_strings(before.get("tags"))]
    merged = {**before, **data, **({"tags": list(dict.fromkeys(tags))} if tags else {})}
    start, end = text.find(START), text.find(END)
    if 0 <= start < end:
        text = f"{text[:start]}{written}{text[end + len(END) :]}"
    else:
        text = f"{written}\n\n{text}"
    metadata = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)
    return f"---\n{metadata}---\n\n{text.strip()}\n"


def _split(readme: str) -> tuple[dict[str, Any], str]:
    """Metadata and text; metadata that cannot be read count as none."""
    match = METADATA.match(readme)
    if match is None:
        return {}, readme
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError:
        data = None
    return data if isinstance(data, dict) else {}, readme[match.end() :]


def _strings(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []
