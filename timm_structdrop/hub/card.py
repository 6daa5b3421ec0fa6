"""Model cards: what the Hub shows of a checkpoint, from the model and its recorded facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from timm_structdrop.errors import UserError
from timm_structdrop.hub.card_text import card_text
from timm_structdrop.hub.licenses import check_license
from timm_structdrop.hub.model_stats import regularizer_uses

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

__all__ = ["make_card"]

TASK = "image-classification"
READERS = ("hfds/", "hfids/", "tfds/", "torch/", "wds/")  # timm's prefixes of data set names


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
    architecture = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", "model"))
    name = known.get("name") or (repo_id or architecture).rpartition("/")[2]
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
    body = card_text(
        model, uses, title=title or name, license=license, repo_id=repo_id, facts=known
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


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
