"""Every architecture with every regularizer, registered with timm as ``<architecture>_<name>``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from torch import nn

from timm_structdrop.errors import UserError, nearest, unexpected_keyword
from timm_structdrop.layers import regularizers
from timm_structdrop.models._chosen_slots import image_size, slots_after, slots_of_kinds
from timm_structdrop.models._where import groups_in_words
from timm_structdrop.models.architectures import Architecture, architectures
from timm_structdrop.models.packaged import check_file, packaged, packaged_cfg
from timm_structdrop.models.placement import (
    PLACEMENT_KEYWORDS,
    place,
    placed_in_words,
    rule_in_words,
)
from timm_structdrop.models.slots import Slot

__all__: list[str] = []  # timm's register_model adds the entrypoints

RATE_KEYWORDS = ("drop_block_rate", "keep_prob")


@dataclass(frozen=True)
class Variant:
    """A registered model: an architecture and the regularizer in it."""

    architecture: Architecture
    regularizer: str

    @property
    def name(self) -> str:
        return f"{self.architecture.name}_{self.regularizer}"

    def keywords(self) -> tuple[str, ...]:
        """What ``timm.create_model`` takes for this variant beside the architecture's keywords."""
        layer = regularizers[self.regularizer].layer
        return (*RATE_KEYWORDS, *PLACEMENT_KEYWORDS, *layer.setting_names())

    def cfgs(self) -> Iterator[tuple[str, PretrainedCfg]]:
        """The pretrained cfgs: timm's weights of the base architecture under timm's tags, and the
        packaged checkpoint.

        A name without a tag describes what it builds without weights. timm gives that place to the
        first weights, so where only the package has some, `*` keeps it for the architecture's cfg.
        """
        facts = packaged().get(self.name)
        own = {}
        if facts is not None:
            cfg = packaged_cfg(facts, dict(self.architecture.cfg))
            own = {f"{self.name}.{facts['tag']}": cfg}
        if own and self.architecture.timm_name is None:
            yield from own.items()
            yield f"{self.name}.*", PretrainedCfg(**self.architecture.cfg)
            return
        for tagged, cfg in self.architecture.default_cfgs(self.name).items():
            if cfg.has_weights:
                cfg = replace(
                    cfg,
                    description=(
                        f"the weights of timm's {self.architecture.timm_name}.{cfg.tag}, "
                        f"trained without {self.regularizer}, which is not yet fitted"
                    ),
                )
            yield tagged, cfg
        yield from own.items()

    def build(self, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        asked = kwargs.pop("pretrained_cfg", None)
        chosen = self._chosen_cfg(pretrained, asked)
        # an export has its settings with it
        trained_with = {} if isinstance(asked, Mapping) else self._trained_with(chosen)
        kwargs = {**trained_with, **kwargs}
        own = {key: kwargs.pop(key) for key in self.keywords() if key in kwargs}
        own.setdefault("img_size", self.architecture.cfg["input_size"][-2:])
        if pretrained:
            overlay = kwargs.get("pretrained_cfg_overlay") or {}
            check_file(overlay.get("file", chosen.file))
        rate = _rate(own.pop("drop_block_rate", None), own.pop("keep_prob", None))

        def construct(**model_kwargs: Any) -> nn.Module:
            try:
                model = self.architecture.constructor(**model_kwargs)
            except TypeError as error:
                unknown = unexpected_keyword(error)
                hint = nearest(unknown[1], self.keywords()) if unknown else ""
                raise TypeError(f"{error}{hint}") from error
            usual = self.placement(model)
            if "stages" in own or "where" in own:
                usual.pop("modules", None)
            return place(model, self.regularizer, **{"drop_prob": rate, **usual, **own})

        feature_cfg: dict[str, Any] = {"out_indices": self.architecture.out_indices}
        if self.architecture.feature_cls is not None:
            feature_cfg["feature_cls"] = self.architecture.feature_cls
        model = build_model_with_cfg(
            construct,
            self.name,
            pretrained,
            pretrained_cfg=chosen.to_dict(),
            feature_cfg=feature_cfg,
            **kwargs,
        )
        # timm's exports read this attribute: they name the settings that came with the tag
        model._model_args = trained_with
        return model

    def placement(self, model: nn.Module) -> dict[str, Any]:
        """Arguments of :func:`~timm_structdrop.models.placement.place` in which the architecture,
        of which ``model`` is one, differs from the regularizer's default placement."""
        change = self.architecture.placements.get(self.regularizer, {})
        return dict(change(model) if callable(change) else change)

    def summary(self) -> str:
        """The rule of the placement in words; `where` says what it comes to."""
        change = self.architecture.placements.get(self.regularizer, {})
        usual = regularizers[self.regularizer].placement
        if callable(change):
            return f"where {change.__module__.rpartition('.')[2]}.{change.__name__} puts it"
        if "stages" in change:
            usual = replace(usual, last_stages=0)
            return f"{rule_in_words(usual)} of {groups_in_words(change['stages'])}"
        return rule_in_words(usual)

    def where(self, model: nn.Module, found: Sequence[Slot]) -> str:
        """Where the layers are, in words.

        Args:
            model: the plain architecture, on any device.
            found: its slots.
        """
        change = self.placement(model)
        usual = regularizers[self.regularizer].placement
        if "modules" in change:
            return placed_in_words(usual, model, slots_after(model, change["modules"]))
        size = image_size(model, self.architecture.cfg["input_size"][-2:])
        stages = change.get("stages")
        slots = slots_of_kinds(
            model, self.regularizer, usual.where, stages, usual.last_stages, size, found
        )
        return placed_in_words(usual, model, slots)

    def _chosen_cfg(self, pretrained: bool, asked: Any) -> PretrainedCfg:
        """The cfg that is asked for: itself, by its tag, or the default.

        Without a tag, pretrained weights are timm's, or else the packaged ones.
        """
        if isinstance(asked, Mapping):
            return PretrainedCfg(**asked)
        if isinstance(asked, PretrainedCfg):
            return asked
        if not asked and pretrained and self.architecture.timm_name is None:
            asked = packaged().get(self.name, {}).get("tag")
        return get_pretrained_cfg(f"{self.name}.{asked}" if asked else self.name)

    def _trained_with(self, cfg: PretrainedCfg) -> dict[str, Any]:
        """The settings of the packaged checkpoint that `cfg` describes; none of another one."""
        facts = packaged().get(self.name)
        if facts is None or cfg.tag != facts["tag"]:
            return {}
        return {"img_size": list(cfg.input_size[-2:]), **facts["model_args"]}


def _rate(drop_block_rate: float | None, keep_prob: float | None) -> float | None:
    if keep_prob is None:
        return drop_block_rate
    if drop_block_rate is not None:
        raise UserError(
            "the rate must be given as drop_block_rate or as keep_prob = 1 - drop_block_rate; "
            f"got both {drop_block_rate} and {keep_prob}"
        )
    if not 0.0 < keep_prob <= 1.0:
        raise UserError(f"keep_prob must be in (0, 1]; got {keep_prob}")
    return 1.0 - keep_prob


def _fits(architecture: Architecture, name: str) -> bool:
    if architecture.regularizers is not None:
        return name in architecture.regularizers
    return architecture.residual or not regularizers[name].residual_only


variants = {
    variant.name: variant
    for variant in (
        Variant(architecture, name)
        for architecture in architectures.values()
        for name in regularizers
        if _fits(architecture, name)
    )
}

default_cfgs = generate_default_cfgs(
    {tagged: cfg for variant in variants.values() for tagged, cfg in variant.cfgs()}
)


def _entrypoint(variant: Variant) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return variant.build(pretrained, **kwargs)

    build.__name__ = build.__qualname__ = variant.name
    build.__doc__ = (
        f"{variant.architecture.summary}, with {variant.regularizer} by the rule: "
        f"{variant.summary()}."
    )
    return register_model(build)


for _variant in variants.values():
    globals()[_variant.name] = _entrypoint(_variant)
