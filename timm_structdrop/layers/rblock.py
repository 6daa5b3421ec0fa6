"""R-Block (Wang & Hu, 2023, arXiv:2307.15150): two sub models with different drop regions."""

from __future__ import annotations

import torch
from torch import Tensor

from timm_structdrop.errors import nearest
from timm_structdrop.layers._base import StructDropLayer
from timm_structdrop.layers._check import (
    check_choice,
    check_drop_prob,
    check_integer,
    check_maps,
)
from timm_structdrop.layers._fork import halves
from timm_structdrop.layers._mask import drop_alike
from timm_structdrop.layers._registry import register
from timm_structdrop.layers._submodels import b_drop_dml, drop, one_of_both, s_drop_dml
from timm_structdrop.layers.dropblock import drop_block_2d

__all__ = ["HEAD_SUB_MODELS", "SUB_MODELS", "RBlock2d", "r_block_2d"]

HEAD_SUB_MODELS = ("r-drop", "c-drop")
SUB_MODELS = ("sdropdml", "bdropdml", "r-dropblock", "r-spatialdropout", *HEAD_SUB_MODELS)
SEEDS = ("valid", "all")


def r_block_2d(
    x: Tensor,
    drop_prob: float | Tensor = 0.2,
    sub_models: str = "sdropdml",
    block_size: int = 3,
    gamma: str | None = None,
    forked: bool = False,
    training: bool = True,
    seeds: str = "valid",
) -> Tensor:
    """Drop the units of two sub models, sub model 1 in the first half of a forked batch.

    With p = ``drop_prob``, ``sub_models`` is one of

    - ``"sdropdml"`` (Algorithm 2): in a fraction p of a sample's channels, the same for both, sub
      model 1 drops blocks that cover half of the map in expectation, sub model 2 the other half.
      Each drops p/2 of the units in expectation.
    - ``"bdropdml"`` (Algorithm 1): the same blocks, which cover a fraction p of the map, dropped by
      sub model 1 in half of the channels and by sub model 2 in the others. Each drops p/2.
    - ``"r-dropblock"``: DropBlock twice, independently. Each drops p.
    - ``"r-spatialdropout"``: whole channels, twice, independently. Each drops p.
    - ``"r-drop"``: single units, twice, independently. Each drops p.
    - ``"c-drop"``: single units, sub model 1 those with u < p and sub model 2 those with
      u > 1 - p, u uniform: disjoint up to p = 1/2, and there each the complement of the other, as
      in the paper's experiment. Each drops p.

    What is kept is divided by the proportion kept: by that of the sample (s in the algorithms) in
    the first two, by that of the whole batch in DropBlock, by 1 - p in the others.

    Args:
        x: activations (2B, C, H, W) if ``forked``, else (B, C, H, W); of any shape with the batch
            first for ``r-drop`` and ``c-drop``.
        drop_prob: p in [0, 1). A 0-d tensor, which is not checked, keeps ``torch.compile`` from
            specialising on it.
        sub_models: see above.
        block_size: side of the blocks; clamped to H and to W.
        gamma: the seed rate of ``bdropdml`` and ``r-dropblock``: ``"paper"``: Eq. (7),
            p H W / (b^2 (H - b + 1) (W - b + 1)) for blocks of side b, which drops less than said
            above because blocks overlap; ``"eq6"``, for ``bdropdml`` only: Eq. (6), p / b^2;
            ``"exact"``; None takes ``"paper"`` for ``bdropdml``, whose algorithm allows Eq. (6) and
            (7), and ``"exact"`` for ``r-dropblock``.
        forked: x holds the halves of both sub models; otherwise each sample goes through one of
            them, by a fair coin.
        training: if False, ``x`` is returned.
        seeds: of ``bdropdml``: ``"valid"``: wherever a whole block fits, as in DropBlock, which
            Eq. (7) is for; ``"all"``: everywhere, as Algorithm 1 is written, blocks are cut at the
            border.

    Returns:
        The shape, dtype and memory format of ``x``.

    Raises:
        ValueError: a setting is out of range or unknown, the batch is odd though forked, or ``x``
            is not (B, C, H, W) where it must be.
    """
    check_sub_models(sub_models)
    block_size = check_integer("block_size", block_size)
    check_gamma(gamma, sub_models)
    check_choice("seeds", seeds, SEEDS)
    if not isinstance(drop_prob, Tensor):
        drop_prob = check_drop_prob(drop_prob)
        if torch.compiler.is_compiling():
            drop_prob = torch.full((), drop_prob, device=x.device, dtype=torch.float32)
    if sub_models not in HEAD_SUB_MODELS:
        check_maps(x)
    if forked:
        halves(x)
    if not training:
        return x
    if sub_models == "r-dropblock":
        return drop_block_2d(x, drop_prob, block_size, gamma or "exact")
    if sub_models == "r-spatialdropout":
        return drop_alike(x, 2, drop_prob)
    if sub_models == "c-drop" and forked:
        return _c_drop(x, drop_prob)
    if sub_models in HEAD_SUB_MODELS:
        return drop_alike(x, x.ndim, drop_prob)
    batch, channels, height, width = x.shape
    shape = (batch // 2 if forked else batch, channels, height, width)
    if sub_models == "bdropdml":
        dropped = b_drop_dml(shape, drop_prob, block_size, gamma or "paper", x.device, seeds)
    else:
        dropped = s_drop_dml(shape, drop_prob, block_size, x.device)
    return drop(x, dropped if forked else one_of_both(dropped))


def check_sub_models(sub_models: str) -> str:
    """``sub_models`` if it is one of :data:`SUB_MODELS`.

    Raises:
        ValueError: it is not.
    """
    if sub_models not in SUB_MODELS:
        raise ValueError(
            f"sub_models must be one of {', '.join(SUB_MODELS)}; "
            f"got {sub_models!r}{nearest(str(sub_models), SUB_MODELS)}"
        )
    return sub_models


def check_gamma(gamma: str | None, sub_models: str) -> str | None:
    """``gamma`` if it names a seed rate of these sub models.

    Raises:
        ValueError: it does not.
    """
    if gamma not in (None, "paper", "eq6", "exact"):
        raise ValueError(f"gamma must be 'paper', 'eq6', 'exact' or None; got {gamma!r}")
    if gamma == "eq6" and sub_models != "bdropdml":
        raise ValueError(f"gamma 'eq6' needs sub_models 'bdropdml'; got {sub_models!r}")
    return gamma


def _c_drop(x: Tensor, drop_prob: float | Tensor) -> Tensor:
    shape = (len(x) // 2, *x.shape[1:])
    uniform = torch.rand(shape, device=x.device, dtype=torch.float32)
    kept = torch.cat((uniform >= drop_prob, uniform <= 1.0 - drop_prob))
    return x * (kept / (1.0 - drop_prob)).to(x.dtype)


@register(
    "rblock",
    summary="two sub models with different drop regions, made to agree by mutual learning",
    paper="Wang & Hu 2023, arXiv:2307.15150",
)
class RBlock2d(StructDropLayer):
    """R-Block: see :func:`r_block_2d`.

    In a step whose task says that the activations are forked the layer maps the halves of two sub
    models, (2B, C, H, W). Otherwise each sample of (B, C, H, W) goes through one of the two, drawn
    anew in every layer.

    Args:
        drop_prob: p in [0, 1): twice what a sub model of ``sdropdml`` and ``bdropdml`` drops, and
            what one of the others drops.
        sub_models: how the two sub models drop; ``r-drop`` and ``c-drop`` are meant for the
            features before the classifier, of any shape.
        block_size: side of the blocks; clamped to the map.
        gamma: the seed rate, ``"paper"`` (Eq. 7), ``"eq6"``, ``"exact"`` or None.
        seeds: where seeds of ``bdropdml`` may be, ``"valid"`` or ``"all"``.

    Raises:
        ValueError: a setting is out of range or unknown.
    """

    def __init__(
        self,
        drop_prob: float = 0.2,
        sub_models: str = "sdropdml",
        block_size: int = 3,
        gamma: str | None = None,
        seeds: str = "valid",
    ) -> None:
        super().__init__(drop_prob)
        self.sub_models = check_sub_models(sub_models)
        self.block_size = check_integer("block_size", block_size)
        self.gamma = check_gamma(gamma, sub_models)
        self.seeds = check_choice("seeds", seeds, SEEDS)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        forked = self.current_step().forked
        if self.is_off():
            return x
        return r_block_2d(
            x,
            self.live_rate(),
            self.sub_models,
            self.block_size,
            self.gamma,
            forked,
            seeds=self.seeds,
        )
