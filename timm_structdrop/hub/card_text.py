"""The body of a model card, section by section."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from timm_structdrop.hub.citations import bibtex, in_words, paper_line
from timm_structdrop.hub.model_stats import (
    ModelStats,
    RegularizerUse,
    fitted_clusters,
    model_stats,
)
from timm_structdrop.hub.usage import Usage
from timm_structdrop.layers import regularizers
from timm_structdrop.models.modes import eval_mode
from timm_structdrop.models.placement import where_in_words
from timm_structdrop.models.structdrop_variants import variants

__all__ = ["card_text"]

SMALL_TEST = 5000  # fewer images do not rank models that are close


def card_text(
    model: nn.Module,
    uses: Sequence[RegularizerUse],
    *,
    title: str,
    license: str,
    repo_id: str | None,
    facts: Mapping[str, Any],
) -> str:
    """Markdown without the metadata; the arguments are those of `make_card`."""
    stats = model_stats(model)
    sections = [
        f"# Model card for {title}",
        introduction(model, uses, facts),
        "## Model details",
        details(model, stats, uses, license, facts),
        *usage(model, stats, repo_id, facts),
        *(section for use in uses for section in regularizer(model, use, facts)),
        *training(facts),
        *evaluation(facts),
        "## Intended use and limits",
        limits(model, stats, uses, facts),
        "## Citation",
        "```bibtex\n" + "\n\n".join(bibtex(use.name for use in uses)) + "\n```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def introduction(model: nn.Module, uses: Sequence[RegularizerUse], facts: Mapping[str, Any]) -> str:
    names = " and ".join(in_words(use.name) for use in uses)
    sentence = "An image classification model"
    sentence += f" regularized with {names}" if names else ""
    dataset = facts.get("dataset_name") or facts.get("dataset")
    sentence += f", trained on {dataset}" if dataset else ""
    sentence += f": {architecture_in_words(model)}."
    return (
        f"{sentence} It is a [timm](https://github.com/huggingface/pytorch-image-models) model of "
        "the package `timm_structdrop`: import both."
    )


def architecture_in_words(model: nn.Module) -> str:
    variant = variants.get(_architecture(model))
    if variant is not None:
        return variant.architecture.summary
    return str(getattr(model, "_model_args", {}).get("base", _architecture(model)))


def details(
    model: nn.Module,
    stats: ModelStats,
    uses: Sequence[RegularizerUse],
    license: str,
    facts: Mapping[str, Any],
) -> str:
    channels, height, width = stats.input_size
    colours = {1: " gray", 3: " RGB"}.get(channels, f" {channels}-channel")
    lines = [
        "- **Model type:** image classification / feature backbone",
        f"- **Architecture:** `{_architecture(model)}`",
        "- **Model stats:**",
        f"  - Params (M): {_short(stats.params / 1e6)}",
        f"  - GMACs: {_short(stats.macs / 1e9)}",
        f"  - Activations (M): {_short(stats.activations / 1e6)}",
        f"  - Image size: {height} x {width},{colours}",
        f"  - Classes: {_num_classes(model)}",
        "- **Papers:**",
        *(f"  - {paper_line(use.name)}" for use in uses),
        *(f"  - {link}" for link in _architecture_papers(model)),
    ]
    dataset = facts.get("dataset_name") or facts.get("dataset")
    lines += [f"- **Dataset:** {dataset}"] if dataset else []
    lines += [f"- **Started from:** {facts['base_model']}"] if facts.get("base_model") else []
    lines += [f"- **License:** {license}"]
    if facts.get("sha256"):
        lines += [f"- **SHA-256 of the weights:** `{facts['sha256']}`"]
    return "\n".join(lines)


def usage(
    model: nn.Module, stats: ModelStats, repo_id: str | None, facts: Mapping[str, Any]
) -> list[str]:
    name = facts.get("name") or (f"hf-hub:{repo_id}" if repo_id else "local-dir:.")
    feature_shapes, map_shape, embedding = _shapes(model, stats)
    code = Usage(
        name,
        stats.input_size[0],
        _num_classes(model),
        facts.get("dataset") == "digits",
        feature_shapes,
        map_shape,
        embedding,
    )
    where = "`pip install timm-structdrop` first."
    if facts.get("name"):
        where += f" `{name}` is part of the package and loads without a network"
        where += f"; from the Hub the name is `hf-hub:{repo_id}`." if repo_id else "."
    return [
        "## Model usage",
        where,
        "### Image classification",
        code.classification(),
        "### Feature maps",
        code.feature_maps(),
        "### Image embeddings",
        code.embeddings(),
    ]


def regularizer(model: nn.Module, use: RegularizerUse, facts: Mapping[str, Any]) -> list[str]:
    """The regularizer's own section: where it sits, its settings, what it has learned."""
    paths = list(use.layers)
    shown = ", ".join(f"`{path}`" for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
    layers = f"{len(paths)} layers ({shown})" if len(paths) > 1 else f"one layer ({shown})"
    where = where_in_words(model, use.name)
    line = f"In short: {regularizers[use.name].summary}. Here it is {layers}"
    line += f": {where}." if where else "."
    rate = facts.get("drop_prob")
    rows = [("rate in training", [rate])] if rate is not None else []
    rows += [(f"`{key}`", values) for key, values in use.settings.items() if values != [None]]
    settings = _table(("setting", "value"), [(key, _values(values)) for key, values in rows])
    return [f"## {in_words(use.name)}", line, settings, *clusters(use, facts)]


def clusters(use: RegularizerUse, facts: Mapping[str, Any]) -> list[str]:
    """What a DropCluster layer has found: cluster maps, masked channels, Hopkins figures."""
    parts = []
    for path, layer in fitted_clusters(use).items():
        height, width = layer.labels.shape[1:]
        channels, masked = len(layer.structured), int((~layer.structured).sum())
        parts.append(
            f"The clusters at `{path}` come with the weights: {layer.n_clusters} in each of "
            f"{channels - masked} structured channels, on {height} x {width} maps. Unstructured "
            f"channels, which are zero in training and at inference: {masked} of {channels}."
        )
    if not parts and use.settings.get("n_clusters"):
        parts.append("No clusters have been found yet: the layer does nothing.")
    elif parts and (picture := facts.get("picture", "clusters.png")):
        parts.append(f"![The clusters of every channel]({picture})")
    hopkins = facts.get("hopkins")
    if parts and hopkins:
        rows = [(f"`{layer}`", f"{value:.3f}") for layer, value in hopkins.items()]
        parts.append(
            "Spatial Hopkins statistic, mean over channels and images (0.5: no structure; towards "
            "1: clustered; a channel that is constant in an image counts as 0):"
        )
        parts.append(_table(("layer", "Spatial Hopkins"), rows))
    return parts


def training(facts: Mapping[str, Any]) -> list[str]:
    rows = []
    for key in ("recipe", "epochs", "seed", "hardware"):
        if facts.get(key) is not None:
            rows.append((key, str(facts[key])))
    versions = facts.get("versions") or {}
    if versions:
        rows.append(("versions", ", ".join(f"{name} {is_}" for name, is_ in versions.items())))
    command = facts.get("command")
    if not (rows or command):
        return []
    return [
        "## Training",
        f"```sh\n{command}\n```" if command else "",
        _table(("", ""), rows) if rows else "",
    ]


def evaluation(facts: Mapping[str, Any]) -> list[str]:
    if facts.get("top1") is None:
        return []
    where = facts.get("dataset_name") or facts.get("dataset") or "the evaluated data"
    n = facts.get("n_eval")
    images = f"{n} images of the {facts.get('split') or 'evaluated'} split of {where}"
    sentence = f"Top-1 accuracy {facts['top1']:.2f} %"
    sentence += f", top-5 {facts['top5']:.2f} %" if facts.get("top5") is not None else ""
    sentence += f", on {images}." if n else f", on {where}."
    if facts.get("selection"):
        sentence += f" The checkpoint is {facts['selection']}: the figure is optimistic by that."
    if facts.get("recipe_note"):
        sentence += f" {facts['recipe_note']}."
    parts = ["## Evaluation", sentence]
    rows = list(facts.get("comparison") or [])
    if rows:
        rows = sorted(rows, key=lambda row: (-row["top1"], row["model"]))
        table = [
            (
                f"`{row['model']}`",
                f"{row['top1']:.2f}",
                str(row["n"]),
                _short(row["params"] / 1e6) if "params" in row else "",
            )
            for row in rows
        ]
        parts.append("### Comparison with the other regularizers")
        parts.append(_table(("model", "top-1 (%)", "images", "params (M)"), table))
        smallest = min(row["n"] for row in rows)
        if smallest < SMALL_TEST:
            parts.append(
                f"One image is {100 / smallest:.2f} points, and each model was trained once: "
                "differences of a few images do not rank the regularizers."
            )
    return parts


def limits(
    model: nn.Module, stats: ModelStats, uses: Sequence[RegularizerUse], facts: Mapping[str, Any]
) -> str:
    _, height, width = stats.input_size
    dataset = facts.get("dataset_name") or facts.get("dataset") or "its training data"
    names = facts.get("label_names")
    classes = f" ({', '.join(map(str, names))})" if names and len(names) <= 20 else ""
    masks = any(fitted_clusters(use) for use in uses)
    lines = [
        f"- For images like those of {dataset}, {height} x {width} pixels, in "
        f"{_num_classes(model)} classes{classes}; and to fine-tune from: give another "
        "`num_classes` to `timm.create_model`.",
        "- It answers with one of its classes whatever the image shows, and was not evaluated on "
        "any other data, nor for robustness, fairness or safety.",
    ]
    if uses:
        rest = ", except that unstructured channels stay masked" if masks else ""
        rate = (
            "Its drop rate comes back with it; `timm_structdrop.set_drop_prob` sets another."
            if facts.get("rate_saved")
            else "Drop rates are not saved with a model, as always with timm: to train on, give "
            "`drop_block_rate`."
        )
        lines.append(f"- The regularizer acts in training only{rest}. {rate}")
    return "\n".join(lines)


@torch.no_grad()
def _shapes(
    model: nn.Module, stats: ModelStats
) -> tuple[list[tuple[int, ...]], tuple[int, ...], int]:
    """Shapes of the default features, of `forward_features` and of an embedding, one image."""
    net: Any = model
    weight = next(model.parameters())
    image = torch.zeros(1, *stats.input_size, device=weight.device, dtype=weight.dtype)
    variant = variants.get(_architecture(model))
    features: list[tuple[int, ...]] = []
    with eval_mode(model):
        maps = net.forward_features(image)
        embedding = net.forward_head(maps, pre_logits=True)
        if variant is not None and hasattr(net, "forward_intermediates"):
            found = net.forward_intermediates(image, intermediates_only=True)
            wanted = variant.architecture.out_indices
            features = [tuple(found[index].shape) for index in wanted if index < len(found)]
    return features, tuple(maps.shape), embedding.shape[-1]


def _architecture(model: nn.Module) -> str:
    return str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", "model"))


def _num_classes(model: nn.Module) -> int:
    return int(getattr(model, "num_classes", 0))


def _architecture_papers(model: nn.Module) -> list[str]:
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    ids = cfg.get("paper_ids") or ()
    ids = (ids,) if isinstance(ids, str) else ids
    return [f"https://arxiv.org/abs/{id.removeprefix('arXiv:')}" for id in ids]


def _short(value: float) -> str:
    """One decimal, as timm's cards; of a small value the first two digits."""
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _values(values: Sequence[Any]) -> str:
    return " or ".join("none" if value is None else json.dumps(value) for value in values)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
