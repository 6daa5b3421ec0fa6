"""R-Block (Wang & Hu, 2023, arXiv:2307.15150): two sub models with different drop regions."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from timm_structdrop.errors import nearest
from timm_structdrop.layers.base import (
    Paper,
    Placement,
    StepAware,
    StructDropLayer,
    check_choice,
    check_drop_prob,
    check_integer,
    check_maps,
    register,
    tell,
)
from timm_structdrop.layers.blocks import (
    clamp_block,
    drop_alike,
    grow_blocks,
    kept_scale,
    paper_rate,
    seed_places,
    seed_rate,
    seed_rate_tensor,
    uniform,
)
from timm_structdrop.layers.dropblock import drop_block_2d

__all__ = ["HEAD_SUB_MODELS", "SUB_MODELS", "Fork", "RBlock2d", "r_block_2d"]

HEAD_SUB_MODELS = ("r-drop", "c-drop")
SUB_MODELS = ("sdropdml", "bdropdml", "r-dropblock", "r-spatialdropout", *HEAD_SUB_MODELS)
SEEDS = ("valid", "all")
WITHOUT_TASK = (
    "an R-Block model is trained without its task: the batch is not forked, and each sample goes "
    "through one random sub model in every layer; train it with timm_structdrop.training.RBlockTask"
)


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
    drawn = uniform(shape, x.device)
    kept = torch.cat((drawn >= drop_prob, drawn <= 1.0 - drop_prob))
    return x * (kept / (1.0 - drop_prob)).to(x.dtype)


class Dropped(NamedTuple):
    """The units that sub models drop, as products of channels and positions.

    Both of the paper's algorithms drop one spatial mask of a sample in some of its channels, so
    their masks are kept as factors: for the 2B rows of a forked batch, sub model 1's B samples
    first,

        unit (c, i, j) of row b is dropped  <=>  channels[b, c] and space[b, i, j].

    That takes B * (C + H * W) random numbers instead of B * C * H * W.

    Attributes:
        channels: (N, C) bool.
        space: (N, H, W) bool.
    """

    channels: Tensor
    space: Tensor


def b_drop_dml(
    shape: tuple[int, int, int, int],
    drop_prob: float | Tensor,
    block_size: int = 3,
    gamma: str = "paper",
    device: torch.device | None = None,
    seeds: str = "valid",
) -> Dropped:
    """Algorithm 1, BDropDML: the same blocks, in complementary channels.

    Each sample has one mask of blocks, and each of its channels belongs to sub model 1 or 2 by a
    fair coin; a sub model drops the blocks in its own channels.

    Args:
        shape: (B, C, H, W) of the activations before the fork.
        drop_prob: p in [0, 1), a float or a 0-d tensor; the expected fraction of a map in blocks.
        block_size: side of the blocks; clamped to H and to W.
        gamma: the seed rate. ``"paper"``: Eq. (7), p H W / (b^2 (H - b + 1) (W - b + 1)) for blocks
            of side b; ``"eq6"``: Eq. (6), p / b^2; both are for blocks that do not overlap, and
            they do. ``"exact"``: the rate at which blocks cover p.
        device: where to draw.
        seeds: ``"valid"``: wherever a whole block fits; ``"all"``: everywhere, as the algorithm is
            written, blocks are cut at the border. Eq. (7) is of the first, Eq. (6) of the second.

    Returns:
        The dropped units of the 2B rows.
    """
    batch, channels, height, width = shape
    size = (height, width)
    block = clamp_block(block_size, size)
    rate: float | Tensor
    if gamma == "paper":
        rate = paper_rate(drop_prob, size, block_size)
    elif gamma == "eq6":
        rate = drop_prob / (block[0] * block[1])
    elif isinstance(drop_prob, Tensor):
        rate = seed_rate_tensor(drop_prob, size, block_size, seeds)
    else:
        rate = seed_rate(drop_prob, size, block_size, seeds)
    drawn = uniform((batch, 1, *seed_places(size, block, seeds)), device) < rate
    blocks = grow_blocks(drawn, block, seeds).squeeze(1)
    first = uniform((batch, channels), device) < 0.5
    return Dropped(torch.cat((first, ~first)), torch.cat((blocks, blocks)))


def s_drop_dml(
    shape: tuple[int, int, int, int],
    drop_prob: float | Tensor,
    block_size: int = 3,
    device: torch.device | None = None,
) -> Dropped:
    """Algorithm 2, SDropDML: the same channels, complementary regions.

    Each channel of a sample is selected with probability p. Each sample has one mask of blocks,
    from seeds everywhere at the rate at which they cover half of the map in expectation, the root
    of Eq. (8) for 0.5. On the selected channels sub model 1 drops the blocks and sub model 2
    everything else.

    Args:
        shape: (B, C, H, W) of the activations before the fork.
        drop_prob: p in [0, 1), a float or a 0-d tensor.
        block_size: side of the blocks; clamped to H and to W.
        device: where to draw.

    Returns:
        The dropped units of the 2B rows.
    """
    batch, channels, height, width = shape
    selected = uniform((batch, channels), device) < drop_prob
    block = clamp_block(block_size, (height, width))
    rate = half_rate((height, width), block_size, device)
    drawn = uniform((batch, 1, height, width), device) < rate
    blocks = grow_blocks(drawn, block, seeds="all").squeeze(1)
    return Dropped(torch.cat((selected, selected)), torch.cat((blocks, ~blocks)))


def one_of_both(dropped: Dropped) -> Dropped:
    """For each sample the units of one sub model, by a fair coin.

    Args:
        dropped: of 2B rows, sub model 1's B first.

    Returns:
        The dropped units of B rows, ``channels`` (B, C) and ``space`` (B, H, W).
    """
    first_channels, second_channels = dropped.channels.chunk(2)
    first_space, second_space = dropped.space.chunk(2)
    coin = uniform((len(first_channels), 1), dropped.channels.device) < 0.5
    return Dropped(
        torch.where(coin, first_channels, second_channels),
        torch.where(coin[:, :, None], first_space, second_space),
    )


def drop(x: Tensor, dropped: Dropped) -> Tensor:
    """``x * M / s``: M zero in the dropped units, s the proportion of ones in M, row by row.

    The proportion is each sample's own, as the algorithms are written for one input. A row without
    ones is zero.

    Args:
        x: activations (N, C, H, W).
        dropped: the dropped units of N rows.

    Returns:
        (N, C, H, W) in the dtype and memory format of ``x``.
    """
    per_map = dropped.space.shape[1:].numel()
    channels, space = dropped.channels.float(), dropped.space.float()
    count = channels.shape[1] * per_map
    scale = kept_scale(count, count - channels.sum(1) * space.sum((1, 2)))
    channels = channels * -scale[:, None]
    # the factors as they lie in memory: a product of two layouts is several times slower
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        factors = channels[:, :, None, None] * space[:, None] + scale[:, None, None, None]
    else:
        factors = channels[:, None, None] * space[..., None] + scale[:, None, None, None]
        factors = factors.permute(0, 3, 1, 2)
    return x * factors.to(x.dtype)


def half_rate(
    size: tuple[int, int], block_size: int, device: torch.device | None
) -> float | Tensor:
    """The seed rate whose blocks cover half of an H x W map."""
    if torch.compiler.is_compiling():
        # the solver of floats is a loop over dicts and caches that no graph holds
        half = torch.full((), 0.5, device=device)
        return seed_rate_tensor(half, size, block_size, seeds="all")
    return seed_rate(0.5, size, block_size, seeds="all")


class Fork(StepAware):
    """Where a batch is forked: (B, ...) to (2B, ...), the batch twice, sub model by sub model.

    It forks in training and only in a step whose task asks for it; otherwise it is the identity. It
    has neither parameters nor buffers. Trained without such a task it warns, once (and once for
    each graph of ``torch.compile``): the R-Block layers behind it then act as single sub models.
    """

    _warned: bool = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.current_step().forked:
            return torch.cat((x, x))
        if torch.compiler.is_compiling():
            tell(WITHOUT_TASK)
        elif not self._warned:
            self._warned = True
            tell(WITHOUT_TASK)
        return x


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two sub models' halves of a forked batch.

    Args:
        x: (2B, ...), sub model 1's samples first.

    Returns:
        (B, ...) twice.

    Raises:
        ValueError: the batch is odd.
    """
    if len(x) % 2:
        raise ValueError(
            f"a forked batch holds two sub models' samples, an even number; got {len(x)}"
        )
    first, second = x.chunk(2)
    return first, second


@register(
    "rblock",
    summary="two sub models with different drop regions, made to agree by mutual learning",
    paper=Paper.with_bibtex(
        "Wang & Hu 2023, arXiv:2307.15150",
        "R-Block",
        "R-Block: Regularized Block of Dropout for convolutional networks",
        "https://arxiv.org/abs/2307.15150",
        "article",
        "wang2023rblock",
        author="Wang, Liqi and Hu, Qiya",
        journal="arXiv preprint arXiv:2307.15150",
        year="2023",
    ),
    placement=Placement(
        where=("conv", "last_conv", "skip"), last_stages=2, note="fork in front of them"
    ),
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

    forks = True
    head_settings: ClassVar = {"sub_models": HEAD_SUB_MODELS}

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
        if self.is_off():
            return x
        return r_block_2d(
            x,
            self.live_rate(),
            self.sub_models,
            self.block_size,
            self.gamma,
            self.current_step().forked,
            seeds=self.seeds,
        )
