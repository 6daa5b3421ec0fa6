"""The registry of architectures: plain models, before any regularizer is attached to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg
from torch import nn

__all__ = ["Architecture", "architectures", "register_architecture", "small_cfg"]

PlacementChange = Mapping[str, Any] | Callable[[nn.Module], Mapping[str, Any]]

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Architecture:
    """One entry of :data:`architectures`.

    Attributes:
        name: the name users write, and the prefix of the registered variants.
        constructor: called with timm's model keywords (`num_classes`, `in_chans`, ...); returns
            the plain model, with random weights.
        cfg: timm's default cfg of the architecture (`input_size`, `pool_size`, `mean`, ...).
        summary: one line for tables.
        timm_name: the timm model whose weights fit, key for key; None where there is none.
        out_indices: the features a `features_only` model returns unless it is told otherwise.
        regularizers: the regularizers to register variants with; None for all that fit.
        placements: by regularizer, arguments of `place` that differ from its default placement, or
            a function of the plain model that returns them.
        feature_cls: timm's wrapper for `features_only` models; None for its default.
        residual: it has residual branches with a place at their ends (slots of kind `last_conv`),
            which is what StochasticDepth needs.
    """

    name: str
    constructor: Callable[..., nn.Module]
    cfg: Mapping[str, Any]
    summary: str
    timm_name: str | None
    out_indices: tuple[int, ...]
    regularizers: tuple[str, ...] | None = None
    placements: Mapping[str, PlacementChange] = field(default_factory=dict)
    feature_cls: str | None = None
    residual: bool = False

    def default_cfgs(self, variant: str) -> dict[str, PretrainedCfg]:
        """What `timm.models.generate_default_cfgs` needs to know of a variant of this architecture.

        Args:
            variant: the name the variant is registered under.

        Returns:
            One cfg under `variant` itself; or, where timm has weights, one cfg under `variant.tag`
            for each tag of timm's, in timm's order: the first one is the default.
        """
        if self.timm_name is None:
            return {variant: PretrainedCfg(**self.cfg)}
        shared = get_arch_pretrained_cfgs(self.timm_name).values()
        return {f"{variant}.{cfg.tag}" if cfg.tag else variant: cfg for cfg in shared}


architectures: dict[str, Architecture] = {}


def register_architecture(
    name: str,
    constructor: Callable[..., nn.Module],
    *,
    summary: str,
    cfg: Mapping[str, Any] | None = None,
    timm_name: str | None = None,
    out_indices: tuple[int, ...] = (0, 1, 2, 3, 4),
    regularizers: tuple[str, ...] | None = None,
    placements: Mapping[str, PlacementChange] | None = None,
    feature_cls: str | None = None,
    residual: bool = False,
) -> Architecture:
    """Enter an architecture into :data:`architectures`; the arguments are its attributes.

    Args:
        cfg: left out where `timm_name` is given: it is then timm's own default cfg.

    Raises:
        ValueError: the name is taken, or not exactly one of `cfg` and `timm_name` is given.
    """
    if name in architectures:
        raise ValueError(f"an architecture's name must be unique; {name!r} is already registered")
    if (cfg is None) == (timm_name is None):
        raise ValueError(
            f"{name!r} must come with either cfg or timm_name; got cfg={cfg}, timm_name={timm_name}"
        )
    if cfg is None:
        cfg = get_pretrained_cfg(timm_name, allow_unregistered=False).to_dict()
    architectures[name] = Architecture(
        name,
        constructor,
        cfg,
        summary,
        timm_name,
        out_indices,
        regularizers,
        placements or {},
        feature_cls,
        residual,
    )
    return architectures[name]


def small_cfg(pool_size: tuple[int, int], **changes: Any) -> dict[str, Any]:
    """The default cfg of an architecture made for CIFAR-10's 32 x 32 colour images.

    Args:
        pool_size: height and width of `forward_features`' map at the default input size.
        **changes: entries that differ.
    """
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": pool_size,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CIFAR10_MEAN,
        "std": CIFAR10_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        **changes,
    }
