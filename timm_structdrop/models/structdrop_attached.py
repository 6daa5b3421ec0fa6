"""The registered model behind :func:`timm_structdrop.attach`: any timm CNN with regularizers in it.

``attach`` writes into a model what timm needs to rebuild it, so that an export of it
(``timm.models.save_for_hf``, ``push_to_hf_hub``, a saved folder) comes back from
``timm.create_model`` with its regularizers and their state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import (
    build_model_with_cfg,
    get_pretrained_cfg,
    is_model,
    list_models,
    model_entrypoint,
    register_model,
)
from torch import nn

from timm_structdrop.errors import UserError, nearest
from timm_structdrop.models.placement import place

__all__: list[str] = []  # timm's register_model adds the entrypoint

NAME = "structdrop_attached"


def attach(model: nn.Module, name: str, **arguments: Any) -> nn.Module:
    """Put a regularizer into a CNN, in place: :func:`timm_structdrop.models.placement.place`, and
    a record of it in the model.

    Several regularizers compose, by one call each. What is attached is recorded where timm keeps a
    model's arguments, so that an export comes back with it, and in ``model.structdrop``, a list for
    :func:`restore`.

    Layers may hang on modules by hooks. ``torch.compile`` the whole model then: modules of one
    class that are compiled one by one share code in torch, whatever their hooks.

    Args:
        model: a timm CNN, or any CNN if ``modules`` are named.
        name: a key of :data:`timm_structdrop.regularizers`.
        arguments: ``drop_prob``, ``stages``, ``where``, ``modules``, ``img_size`` and the layer's
            settings, see :func:`~timm_structdrop.models.placement.place`.

    Returns:
        ``model``.

    Raises:
        UserError: an unknown name, stage, kind, module or setting, or a model without a place for
            the regularizer.
    """
    place(model, name, **arguments)
    record = [*getattr(model, "structdrop", []), {"name": name, **arguments}]
    model.structdrop = record  # type: ignore[assignment]
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, Mapping) and cfg.get("architecture"):
        known = dict(getattr(model, "_model_args", {}))
        base = known.pop("base", cfg["architecture"])
        model.pretrained_cfg = model.default_cfg = {**cfg, "architecture": NAME}  # type: ignore[assignment]
        # timm's factory writes this attribute and its exports read it; there is no public setter
        model._model_args = {**known, "base": base, "regularizers": record}  # type: ignore[assignment]
    return model


def restore(model: nn.Module, record: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Attach again what ``model.structdrop`` of another model says was attached to it.

    Raises:
        UserError: an entry is not a mapping with a ``name``, or :func:`attach` refuses it.
    """
    for entry in record:
        if not isinstance(entry, Mapping) or "name" not in entry:
            raise UserError(f"a record of a regularizer needs a name; got {entry!r}")
        attach(model, **entry)
    return model


def structdrop_attached(
    pretrained: bool = False,
    *,
    base: str,
    regularizers: Sequence[Mapping[str, Any]],
    pretrained_cfg: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """A timm model with regularizers attached to it.

    Args:
        pretrained: load weights: those of the folder or repository the call comes from, else
            timm's weights of ``base``.
        base: a timm model's name.
        regularizers: arguments of :func:`attach`, one mapping each.
        pretrained_cfg: from ``timm.create_model``.
        kwargs: keywords of the base model.

    Raises:
        UserError: ``base`` is unknown, or :func:`attach` refuses.
    """
    if not is_model(base) or base == NAME:
        raise UserError(
            f"base must be a model timm knows; got {base!r}{nearest(base, list_models())}"
        )
    exported = isinstance(pretrained_cfg, Mapping)
    cfg = dict(pretrained_cfg) if exported else get_pretrained_cfg(base).to_dict()

    def construct(**model_kwargs: Any) -> nn.Module:
        model = model_entrypoint(base)(pretrained=pretrained and not exported, **model_kwargs)
        return restore(model, regularizers)

    if kwargs.get("features_only"):
        kwargs.setdefault("feature_cls", "getter")
        n_features = len(list(construct().feature_info))  # type: ignore[arg-type]
        kwargs.setdefault("out_indices", tuple(range(n_features)))
    model = build_model_with_cfg(
        construct,
        NAME,
        pretrained and exported,
        pretrained_cfg={**cfg, "architecture": NAME},
        **kwargs,
    )
    model._model_args = {"base": base, "regularizers": list(regularizers)}
    return model


register_model(structdrop_attached)
