"""CamDrop (Wang, Li, Wang & Lin, CIKM 2019): drop blocks where a class activation map is high."""

from __future__ import annotations

import torch
from torch import Tensor

from timm_structdrop.layers._base import StructDropLayer
from timm_structdrop.layers._blocks import clamp_block, grow_blocks
from timm_structdrop.layers._check import check_choice, check_drop_prob, check_integer, check_maps
from timm_structdrop.layers._few_maps import drop_in_maps
from timm_structdrop.layers._guide import (
    candidate_pixels,
    check_alpha,
    dominant_channels,
    guidance,
    highest,
    how_many_pixels,
    inner_seeds,
)
from timm_structdrop.layers._rate import paper_rate
from timm_structdrop.layers._registry import register
from timm_structdrop.layers._sparse import may_look_at_data
from timm_structdrop.layers._tell import tell

__all__ = ["CamDrop2d", "cam_drop_2d"]

CHOICES = {
    "guide": ("cam", "avg"),
    "channels": ("dominant", "all"),
    "rank": ("valid", "all"),
    "seed_rate": ("candidates", "dropblock"),
}
# what the layer asks its training task for
GUIDED_BY = {"cam": "target", "predicted": "prediction", "avg": None}
WITHOUT_CLASSES = (
    "CamDrop2d: no target was given to this forward in training, so averages guide it "
    "(guide='avg'); train with timm_structdrop.training.StructDropTask"
)


def cam_drop_2d(
    x: Tensor,
    alpha: Tensor | None,
    drop_prob: float | Tensor = 0.1,
    block_size: int = 7,
    guide: str = "cam",
    channels: str = "dominant",
    n_channels: int | float | None = None,
    n_pixels: int | None = None,
    rank: str = "all",
    seed_rate: str = "dropblock",
    training: bool = True,
) -> Tensor:
    """Zero blocks at the pixels and in the channels that speak most for the target class.

    With J = sum_c alpha_c x_c, Eqs. (5) and (7), the candidates of a sample are its pixels of
    highest J, Eq. (6), in its channels of highest alpha, Eq. (8). Each pair of a pixel and a
    channel seeds a block with the probability that ``seed_rate`` says, Eq. (9); what is kept is
    multiplied by CHW / count_ones(M) of the sample, Eq. (10).

    A seed is the middle of its block, the first of two middles if the block is even. The seed is
    valid if the block fits in the map.

    How Eqs. (6) to (9) are read decides whether a network trains. As the authors ran them, which is
    the default, less than 0.1 % of the units are dropped on maps of CIFAR-10's sizes at gamma =
    0.9. To the letter, ``rank="valid", seed_rate="candidates"``, the seed rate is 40 times as high
    on a map of 32 x 32, and the blocks lie where the weights of the label say, so that the layers
    behind them learn to read the label from the holes: the training loss of a ResNet-8 fell below
    that of a plain one, and its accuracy went with it (``benchmarks/results/defaults.md``).

    Eq. (10) normalises each sample; the authors' code the whole batch.

    Args:
        x: activations (B, C, H, W).
        alpha: (B, C'), the classifier's weights of each sample's target. Eq. (7) makes C of them:
            sums over groups of floor(C' / C), or repetitions if C > C'. Not read if ``guide`` is
            ``"avg"``, where it may be None.
        drop_prob: 1 - gamma of the paper, in [0, 1). A 0-d tensor, which is not checked, keeps
            ``torch.compile`` from specialising on it.
        block_size: side of the blocks; clamped to H and to W.
        guide: ``"cam"``; or ``"avg"``, Table 2: J is the mean of the channels and alpha is each
            channel's mean over the map.
        channels: ``"dominant"``; or ``"all"``, Table 3: every channel is a candidate.
        n_channels: n', how many channels are candidates: a whole number, C if that is less; or a
            fraction of C (in (0, 1), Table 4), rounded down; None for C / 8. At least 1. All of
            them are ``channels="all"``.
        n_pixels: n, how many pixels are ranked: a number, all of them if that is more; None for
            H W / (rows columns), rounded down. (The paper's n = (1 - 1 / r^2) H W counts those that
            are not.)
        rank: ``"all"``, the authors' code: the n best pixels of the map, of which those that are
            valid seeds are candidates. There may be none. ``"valid"``: the n best of the valid
            seeds.
        seed_rate: ``"dropblock"``, the authors' code: Eq. (1) of DropBlock, drop_prob H W / (rows
            columns V) with V valid seeds, however few of them are candidates. ``"candidates"``,
            Eqs. (4) and (9) to the letter: drop_prob H W / (rows columns n), at most 1, which is
            drop_prob itself where H W / (rows columns) is whole and n its default.
        training: if False, ``x`` is returned.

    Returns:
        (B, C, H, W) in the dtype and memory format of ``x``; ``x`` itself if ``drop_prob`` is the
        float 0, and on a CPU if no seed was drawn. No gradient flows through J or alpha.

    Raises:
        ValueError: a setting is out of range, or ``x`` or ``alpha`` does not have its shape.
    """
    block_size = check_integer("block_size", block_size)
    _check_choices(guide=guide, channels=channels, rank=rank, seed_rate=seed_rate)
    n_channels, n_pixels = _check_n_channels(n_channels), _check_n_pixels(n_pixels)
    check_maps(x)
    if not isinstance(drop_prob, Tensor):
        drop_prob = check_drop_prob(drop_prob)
        if drop_prob == 0.0:
            return x
    if not training:
        return x
    size = (x.shape[2], x.shape[3])
    block = clamp_block(block_size, size)
    check_alpha(x, alpha, guide)
    n = how_many_pixels(size, block, n_pixels, rank)
    n_chosen = dominant_channels(x.shape[1], 1.0 if channels == "all" else n_channels)
    if seed_rate == "dropblock":
        rate = paper_rate(drop_prob, size, block_size)
    else:
        rate = drop_prob * (size[0] * size[1] / (block[0] * block[1] * n))
    with torch.no_grad():
        # float32 whatever the activations: float16 uniforms would round the rate
        drawn = torch.rand((len(x), n_chosen, n), device=x.device, dtype=torch.float32) < rate
        samples = torch.arange(len(x), device=x.device)[:, None]
        seen = x
        if may_look_at_data(x):  # rank only the samples in which a seed was drawn
            drawn_in = drawn.flatten(1).any(1).nonzero().squeeze(1)
            if len(drawn_in) == 0:
                return x
            seen, drawn = x.index_select(0, drawn_in), drawn.index_select(0, drawn_in)
            alpha = None if alpha is None else alpha.index_select(0, drawn_in)
        weights, intensity = guidance(seen, alpha, guide)
        chosen = highest(weights, n_chosen)
        pixels = candidate_pixels(intensity, block, n, rank)
        if pixels is not None:
            pixels = pixels[:, None].expand_as(drawn)
        if may_look_at_data(x):  # and grow blocks only in their maps with a seed
            found = drawn.any(2).nonzero(as_tuple=True)
            samples, chosen, drawn = drawn_in[found[0]], chosen[found], drawn[found]
            pixels = None if pixels is None else pixels[found]
        dropped = _grow(drawn, pixels, size, block, rank)
    return drop_in_maps(x, samples, chosen, dropped)


def _grow(
    drawn: Tensor,
    pixels: Tensor | None,
    size: tuple[int, int],
    block: tuple[int, int],
    rank: str,
) -> Tensor:
    """The blocks of the seeds drawn, (..., H, W) bool.

    Args:
        drawn: at which of the n candidates a seed was drawn, (..., n) bool.
        pixels: the candidates, places (..., n) of the seed grid, see
            :func:`~timm_structdrop.layers._guide.candidate_pixels`; None for all of it.
        size: (H, W).
        block: (rows, columns) of the blocks, at most (H, W).
        rank: ``"valid"`` or ``"all"``, which seed grid it is.
    """
    height, width = size
    if rank == "valid":
        height, width = height - block[0] + 1, width - block[1] + 1
    if pixels is not None:
        grid = drawn.new_zeros((*drawn.shape[:-1], height * width))
        drawn = grid.scatter_(-1, pixels, drawn)
    seeds = drawn.view(*drawn.shape[:-1], height, width)
    return grow_blocks(seeds if rank == "valid" else inner_seeds(seeds, block), block)


def _check_choices(**settings: str) -> None:
    for name, value in settings.items():
        check_choice(name, value, CHOICES[name])


def _check_n_channels(n_channels: int | float | None) -> int | float | None:
    if n_channels is None or (isinstance(n_channels, float) and 0.0 < n_channels < 1.0):
        return n_channels
    rule = (
        "an integer of at least 1, a fraction of the channels in (0, 1) or None "
        "(all of them are channels='all')"
    )
    if isinstance(n_channels, float):
        raise ValueError(f"n_channels must be {rule}; got {n_channels}")
    return check_integer("n_channels", n_channels, rule)


def _check_n_pixels(n_pixels: int | None) -> int | None:
    if n_pixels is None:
        return None
    return check_integer("n_pixels", n_pixels, "an integer of at least 1 or None")


@register(
    "camdrop",
    summary="drops blocks where the class activation map is highest",
    paper="Wang et al. 2019, doi:10.1145/3357384.3357999",
)
class CamDrop2d(StructDropLayer):
    """CamDrop: see :func:`cam_drop_2d`.

    A training task tells the layer the weights of the classes that guide it; a forward in training
    without them is guided by averages (``guide="avg"``), and says so once (and once for each graph
    of ``torch.compile``). Behind the fork of R-Block both sub models have the same classes.

    With ``guide="cam"`` the blocks depend on the label, and the layers behind them can learn to
    read it there; at the rates of the default there is too little of it to matter, at those of
    ``seed_rate="candidates"`` networks were seen to fail. ``guide="predicted"``, which is not in
    the paper, cannot leak: the blocks are a function of the image. It costs a forward of the batch
    in eval mode without gradients, which :class:`~timm_structdrop.training.StructDropTask` makes
    before each step. The running statistics of batch norm that this forward reads count a forward
    twice that gradient checkpointing repeats, so that it may predict, and drop, otherwise there. A
    prediction that is nearly always right is nearly the label: classes drawn at random guided as
    well in our measurements, and left less to read (``benchmarks/results/defaults.md``).

    Args:
        drop_prob: 1 - gamma of the paper, in [0, 1).
        block_size: side of the blocks; clamped to the map.
        guide: ``"cam"``: the target's class activation map; ``"predicted"``: that of the class
            which the network predicts; ``"avg"``: means, Table 2.
        channels: ``"dominant"`` or ``"all"``.
        n_channels: candidate channels: a whole number, a fraction in (0, 1), or None for an eighth.
        n_pixels: ranked pixels; None for as many as blocks have room.
        rank: ``"all"`` (the authors' code) or ``"valid"``.
        seed_rate: ``"dropblock"`` (the authors' code) or ``"candidates"`` (the paper's letter).

    Raises:
        ValueError: a setting is out of range.
    """

    needs_classifier = True

    def __init__(
        self,
        drop_prob: float = 0.1,
        block_size: int = 7,
        guide: str = "cam",
        channels: str = "dominant",
        n_channels: int | float | None = None,
        n_pixels: int | None = None,
        rank: str = "all",
        seed_rate: str = "dropblock",
    ) -> None:
        super().__init__(drop_prob)
        check_choice("guide", guide, tuple(GUIDED_BY))
        _check_choices(channels=channels, rank=rank, seed_rate=seed_rate)
        self.block_size = check_integer("block_size", block_size)
        self.guide = guide
        self.channels = channels
        self.n_channels = _check_n_channels(n_channels)
        self.n_pixels = _check_n_pixels(n_pixels)
        self.rank = rank
        self.seed_rate = seed_rate
        self.needs_classes = GUIDED_BY[guide]
        self._warned = guide == "avg"

    def forward(self, x: Tensor) -> Tensor:
        if self.is_off():
            return x
        forked, _, alpha = self.current_step()
        if alpha is None:
            self._warn()
        elif forked and len(x) == 2 * len(alpha):
            alpha = torch.cat((alpha, alpha))  # a layer in front of the fork has the batch once
        return cam_drop_2d(
            x,
            alpha,
            self.live_rate(),
            self.block_size,
            "avg" if alpha is None or self.guide == "avg" else "cam",
            self.channels,
            self.n_channels,
            self.n_pixels,
            self.rank,
            self.seed_rate,
        )

    def _warn(self) -> None:
        if self._warned:
            return
        if not torch.compiler.is_compiling():
            self._warned = True
        tell(WITHOUT_CLASSES)
