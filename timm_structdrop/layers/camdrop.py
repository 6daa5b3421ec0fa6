"""CamDrop (Wang, Li, Wang & Lin, CIKM 2019): drop blocks where a class activation map is high."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from timm_structdrop.layers._base import StructDropLayer
from timm_structdrop.layers._blocks import clamp_block, grow_blocks
from timm_structdrop.layers._check import check_choice, check_drop_prob, check_integer, check_maps
from timm_structdrop.layers._few_maps import drop_in_maps
from timm_structdrop.layers._fork import ForkAware
from timm_structdrop.layers._guide import (
    candidate_pixels,
    dominant_channels,
    guidance,
    highest,
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
WITHOUT_TARGET = (
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
    rank: str = "valid",
    seed_rate: str = "candidates",
    training: bool = True,
) -> Tensor:
    """Zero blocks at the pixels and in the channels that speak most for the target class.

    With J = sum_c alpha_c x_c, Eqs. (5) and (7), the candidates of a sample are its pixels of
    highest J, Eq. (6), in its channels of highest alpha, Eq. (8). Each pair of a pixel and a
    channel seeds a block with the probability that ``seed_rate`` says, Eq. (9); what is kept is
    multiplied by CHW / count_ones(M) of the sample, Eq. (10).

    A seed is the middle of its block, the first of two middles if the block is even. The seed is
    valid if the block fits in the map.

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
        n_channels: n', how many channels are candidates: a number, C if that is less; or a fraction
            of C (a float in (0, 1], Table 4), rounded down; None for C / 8. At least 1.
        n_pixels: n, how many pixels are ranked: a number, all of them if that is more; None for
            the paper's H W / (rows columns), rounded down.
        rank: ``"valid"``: the n best of the valid seeds; ``"all"``: Eq. (9) to the letter, the n
            best pixels, of which the valid ones are candidates. There may be none.
        seed_rate: ``"candidates"``: drop_prob H W / (rows columns n), at most 1. This is the
            paper's ``drop_prob`` at the default n, and Eq. (1) of DropBlock if n is all of the
            valid seeds. ``"dropblock"``: that Eq. (1) whatever n, as in the authors' code.
        training: if False, ``x`` is returned.

    Returns:
        (B, C, H, W) in the dtype and memory format of ``x``; ``x`` itself if ``drop_prob`` is the
        float 0. No gradient flows through J or alpha.

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
    with torch.no_grad():
        weights, intensity = guidance(x, alpha, guide)
        pixels, n = candidate_pixels(intensity, block, n_pixels, rank)
        n_chosen = dominant_channels(x.shape[1], 1.0 if channels == "all" else n_channels)
        chosen = highest(weights, n_chosen)
        if seed_rate == "dropblock":
            rate = paper_rate(drop_prob, size, block_size)
        else:
            rate = drop_prob * (size[0] * size[1] / (block[0] * block[1] * n))
        # float32 whatever the activations: float16 uniforms would round the rate
        drawn = torch.rand((*chosen.shape, n), device=x.device, dtype=torch.float32) < rate
        samples = torch.arange(len(x), device=x.device)[:, None]
        if pixels is not None:
            pixels = pixels[:, None].expand_as(drawn)
        if may_look_at_data(x):  # go on with only the maps in which a seed was drawn
            found = drawn.any(2).nonzero(as_tuple=True)
            samples, chosen, drawn = found[0], chosen[found], drawn[found]
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
    if n_channels is None or (isinstance(n_channels, float) and 0.0 < n_channels <= 1.0):
        return n_channels
    rule = "an integer of at least 1, a fraction of the channels in (0, 1] or None"
    if isinstance(n_channels, float):
        raise ValueError(f"n_channels must be {rule}; got {n_channels}")
    return check_integer("n_channels", n_channels, rule)


def _check_n_pixels(n_pixels: int | None) -> int | None:
    if n_pixels is None:
        return None
    return check_integer("n_pixels", n_pixels, "an integer of at least 1 or None")


@register(
    "camdrop",
    summary="drops blocks where the target's class activation map is highest",
    paper="Wang et al. 2019, doi:10.1145/3357384.3357999",
)
class CamDrop2d(StructDropLayer, ForkAware):
    """CamDrop: see :func:`cam_drop_2d`.

    A training task gives the layer each batch's target through :meth:`set_cam`; a forward in
    training without it is guided by averages (``guide="avg"``), and says so once (and once for each
    graph of ``torch.compile``). Behind the fork of R-Block both sub models have the same target.

    The blocks depend on the label, so the layers behind them can learn to read it there: a network
    with many of these layers on small maps may fit its training data far better than it predicts.
    Fewer layers, smaller blocks or a schedule that ends at 0 make that harder.

    Args:
        drop_prob: 1 - gamma of the paper, in [0, 1).
        block_size: side of the blocks; clamped to the map.
        guide: ``"cam"`` or ``"avg"``.
        channels: ``"dominant"`` or ``"all"``.
        n_channels: candidate channels: a number, a fraction (float), or None for an eighth.
        n_pixels: ranked pixels; None for as many as blocks have room.
        rank: ``"valid"`` or ``"all"``.
        seed_rate: ``"candidates"`` or ``"dropblock"``.

    Raises:
        ValueError: a setting is out of range.
    """

    needs_target = True

    def __init__(
        self,
        drop_prob: float = 0.1,
        block_size: int = 7,
        guide: str = "cam",
        channels: str = "dominant",
        n_channels: int | float | None = None,
        n_pixels: int | None = None,
        rank: str = "valid",
        seed_rate: str = "candidates",
    ) -> None:
        super().__init__(drop_prob)
        _check_choices(guide=guide, channels=channels, rank=rank, seed_rate=seed_rate)
        self.block_size = check_integer("block_size", block_size)
        self.guide = guide
        self.channels = channels
        self.n_channels = _check_n_channels(n_channels)
        self.n_pixels = _check_n_pixels(n_pixels)
        self.rank = rank
        self.seed_rate = seed_rate
        self.needs_target = guide == "cam"
        self.cam: Tensor | None = None
        self._told = guide == "avg"

    def set_cam(self, alpha: Tensor | None) -> None:
        """The classifier's weights of the coming batch's targets, (B, C'); None forgets them."""
        self.cam = None if alpha is None else alpha.detach()

    def forward(self, x: Tensor) -> Tensor:
        forked = self.training and self.is_forked()
        if self.is_off():
            return x
        cam = self.cam
        if cam is None:
            self._tell()
        elif forked and len(x) == 2 * len(cam):
            cam = torch.cat((cam, cam))  # a layer in front of the fork has the batch once
        return cam_drop_2d(
            x,
            cam,
            self.live_rate(),
            self.block_size,
            "avg" if cam is None else self.guide,
            self.channels,
            self.n_channels,
            self.n_pixels,
            self.rank,
            self.seed_rate,
        )

    def _tell(self) -> None:
        if self._told:
            return
        if not torch.compiler.is_compiling():
            self._told = True
        tell(WITHOUT_TARGET)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cam": None}  # a copy made in mid-step does not keep the target
