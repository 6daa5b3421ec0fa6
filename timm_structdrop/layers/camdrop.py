"""CamDrop (Wang, Li, Wang & Lin, CIKM 2019): drop blocks where a class activation map is high."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from timm_structdrop.layers.base import (
    Paper,
    Placement,
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
    grow_blocks,
    kept_scale,
    may_look_at_data,
    paper_rate,
    seed_places,
    uniform,
)

__all__ = ["CamDrop2d", "cam_drop_2d", "guidance"]

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
        drawn = uniform((len(x), n_chosen, n), x.device) < rate
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
        pixels: the candidates, places (..., n) of the seed grid, see :func:`candidate_pixels`;
            None for all of it.
        size: (H, W).
        block: (rows, columns) of the blocks, at most (H, W).
        rank: ``"valid"`` or ``"all"``, which seed grid it is.
    """
    places = seed_places(size, block, rank)
    if pixels is not None:
        grid = drawn.new_zeros((*drawn.shape[:-1], places[0] * places[1]))
        drawn = grid.scatter_(-1, pixels, drawn)
    seeds = drawn.view(*drawn.shape[:-1], *places)
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


def compress(alpha: Tensor, channels: int) -> Tensor:
    """Eq. (7): as many weights as a layer has channels, from those of the classifier.

    With g = floor(C' / C), weight c is the sum of alpha[c g], ..., alpha[c g + g - 1]; the last
    C' - C g are not used. The paper has no case of C > C'; then weight c is alpha[floor(c C' / C)].

    Args:
        alpha: (B, C').
        channels: C.

    Returns:
        (B, C) float32.
    """
    alpha = alpha.float()
    features = alpha.shape[1]
    if channels > features:
        index = torch.arange(channels, device=alpha.device) * features // channels
        return alpha.index_select(1, index)
    group = features // channels
    return alpha[:, : group * channels].unflatten(1, (channels, group)).sum(2)


def guidance(x: Tensor, alpha: Tensor | None, guide: str) -> tuple[Tensor, Tensor]:
    """The weights of the channels (B, C) and the map J (B, H, W), both float32.

    Args:
        x: activations (B, C, H, W).
        alpha: the classifier's weights (B, C'), for ``"cam"``.
        guide: ``"cam"``: J = sum_c alpha_c x_c, Eqs. (5) and (7); ``"avg"``: J is the mean of the
            channels, and a channel's weight its mean over the map.
    """
    if guide == "avg" or alpha is None:
        return x.mean((2, 3), dtype=torch.float32), x.mean(1, dtype=torch.float32)
    weights = compress(alpha, x.shape[1])
    if torch.compiler.is_compiling():  # fuses what would be a float32 copy of x
        return weights, (x.float() * weights[:, :, None, None]).sum(1)
    with torch.autocast(x.device.type, enabled=False):  # it would round J to half precision
        cam = torch.bmm(weights[:, None], x.float().flatten(2))
    return weights, cam.view(x.shape[0], x.shape[2], x.shape[3])


def check_alpha(x: Tensor, alpha: Tensor | None, guide: str) -> None:
    """That the weights are there where they are needed.

    Args:
        x: activations (B, C, H, W).
        alpha: the classifier's weights (B, C').
        guide: ``"cam"`` needs them.

    Raises:
        ValueError: ``alpha`` is needed and is not (B, C').
    """
    if guide == "cam" and (alpha is None or alpha.ndim != 2 or alpha.shape[0] != x.shape[0]):
        received = None if alpha is None else tuple(alpha.shape)
        raise ValueError(
            f"alpha must be (B, features) with B = {x.shape[0]} where guide is 'cam'; "
            f"got {received}"
        )


def how_many_pixels(
    size: tuple[int, int], block: tuple[int, int], n_pixels: int | None = None, rank: str = "all"
) -> int:
    """n of Eq. (6): how many positions of the seed grid are candidates.

    Args:
        size: (H, W) of the map.
        block: (rows, columns) of the blocks, at most (H, W).
        n_pixels: n, all of the grid if that is more; None for floor(H W / (rows columns)).
        rank: ``"all"``: the seed grid is the map; ``"valid"``: it is that of :func:`inner_seeds`.
    """
    n = size[0] * size[1] // (block[0] * block[1]) if n_pixels is None else n_pixels
    rows, columns = seed_places(size, block, rank)
    return min(n, rows * columns)


def candidate_pixels(
    intensity: Tensor, block: tuple[int, int], n: int, rank: str = "all"
) -> Tensor | None:
    """Eq. (6): the n positions of the seed grid where J is highest.

    Args:
        intensity: J (B, H, W).
        block: (rows, columns) of the blocks, at most (H, W).
        n: of :func:`how_many_pixels`.
        rank: as there.

    Returns:
        Places (B, n) int64 of the flattened grid, in no order; None for all of the grid.
    """
    if rank == "valid":
        intensity = inner_seeds(intensity, block)
    intensity = intensity.flatten(1)
    return None if n == intensity.shape[1] else highest(intensity, n)


def dominant_channels(channels: int, n_channels: int | float | None = None) -> int:
    """n' of Eq. (8): how many of C channels are candidates.

    Args:
        channels: C.
        n_channels: a number, C if that is less; a float, a fraction of C, rounded down; None, C / 8
            rounded down. At least 1.
    """
    if n_channels is None:
        return max(1, channels // 8)
    if isinstance(n_channels, float):
        return max(1, int(n_channels * channels))
    return min(n_channels, channels)


def highest(values: Tensor, k: int) -> Tensor:
    """Indices of the highest values in each row; all of them are in order, fewer in no order.

    Args:
        values: (B, N).
        k: how many, in [1, N].

    Returns:
        (B, k) int64.
    """
    if k == values.shape[1]:
        return torch.arange(k, device=values.device).expand(len(values), k)
    return values.topk(k, dim=1, sorted=False).indices


def inner_seeds(maps: Tensor, block: tuple[int, int]) -> Tensor:
    """The part of maps where a block fits around a seed.

    A block reaches (rows - 1) // 2 above its seed and rows // 2 below: the seed is the block's
    middle, the first of two if it is even.

    Args:
        maps: (..., H, W).
        block: (rows, columns) of the blocks, at most (H, W).

    Returns:
        (..., H - rows + 1, W - columns + 1), a view.
    """
    height, width = maps.shape[-2:]
    top, left = (block[0] - 1) // 2, (block[1] - 1) // 2
    return maps[..., top : height - block[0] // 2, left : width - block[1] // 2]


def drop_in_maps(x: Tensor, samples: Tensor, chosen: Tensor, dropped: Tensor) -> Tensor:
    """``x`` without the dropped units, what is kept multiplied by CHW / count_ones(M) per sample.

    Args:
        x: activations (B, C, H, W).
        samples: the sample of each of R maps, (R,) int64; or numbers 0 to B - 1, (B, 1), and each
            sample has n' maps. The second has no data-dependent shapes and can be compiled.
        chosen: the channel of each of these maps, (R,) or (B, n') int64, no map twice.
        dropped: these maps (R, H, W) or (B, n', H, W), True where a unit is dropped.

    Returns:
        (B, C, H, W) in the dtype and memory format of ``x``.
    """
    scale = _scale(x, samples, dropped)
    if torch.compiler.is_compiling():
        return x * _factors(x, scale, chosen, dropped)
    out: Tensor = _ScaleAndDrop.apply(x, scale, samples, chosen, dropped)
    return out


def _scale(x: Tensor, samples: Tensor, dropped: Tensor) -> Tensor:
    """CHW / count_ones(M) of each sample, (B, 1, 1, 1) in the dtype of ``x``."""
    n_dropped = dropped.sum((-2, -1), dtype=torch.float32)
    if samples.ndim == 1:
        n_dropped = n_dropped.new_zeros(len(x)).index_add_(0, samples, n_dropped)
    else:
        n_dropped = n_dropped.sum(1)
    units = x.shape[1] * x.shape[2] * x.shape[3]
    return kept_scale(units, units - n_dropped).to(x.dtype)[:, None, None, None]


def _factors(x: Tensor, scale: Tensor, chosen: Tensor, dropped: Tensor) -> Tensor:
    """What ``x`` is multiplied by: ``scale``, and 0 where a chosen map (B, n') has dropped units.

    Each map looks up its factors in a list of those of the chosen maps and of one that keeps all:
    a pointwise expression, which a compiler fuses with the product.
    """
    factors = torch.where(dropped, 0.0, scale)
    factors = torch.cat([factors, scale.expand(-1, 1, *x.shape[2:])], 1)
    n = chosen.shape[1]
    numbers = torch.arange(n, device=x.device).expand_as(chosen)
    numbers = chosen.new_full(x.shape[:2], n).scatter(1, chosen, numbers)
    return factors.gather(1, numbers[:, :, None, None].expand_as(x))


class _ScaleAndDrop(torch.autograd.Function):
    """``x * scale`` with zeros where the maps ``[samples, chosen]`` of x have dropped units.

    Only these maps are written again, and no mask of all maps waits for the backward pass.
    """

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, samples: Tensor, chosen: Tensor, dropped: Tensor
    ) -> Tensor:
        out = x * scale
        out[samples, chosen] = out[samples, chosen].masked_fill_(dropped, 0.0)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ScaleAndDrop.apply(grad, *ctx.saved_tensors), None, None, None, None


@register(
    "camdrop",
    summary="drops blocks where the class activation map is highest",
    paper=Paper.with_bibtex(
        "Wang et al. 2019, doi:10.1145/3357384.3357999",
        "CamDrop",
        "CamDrop: A New Explanation of Dropout and A Guided Regularization Method for Deep "
        "Neural Networks",
        "https://doi.org/10.1145/3357384.3357999",
        "inproceedings",
        "wang2019camdrop",
        author="Wang, Hongjun and Wang, Guangrun and Li, Guanbin and Lin, Liang",
        booktitle="Proceedings of the 28th ACM International Conference on Information and "
        "Knowledge Management",
        year="2019",
        doi="10.1145/3357384.3357999",
    ),
    placement=Placement(where=("skip_in", "conv", "last_conv"), last_stages=2),
)
class CamDrop2d(StructDropLayer):
    """CamDrop: see :func:`cam_drop_2d`.

    A training task tells the layer the weights of the classes that guide it; a forward in training
    without them is guided by averages (``guide="avg"``), and says so once (and once for each graph
    of ``torch.compile``). Behind the fork of R-Block both sub models have the same classes.

    With ``guide="cam"`` the blocks depend on the label, and the layers behind them can learn to
    read it there. In our measurements (``benchmarks/results/defaults.md``) a wrong label cost the
    default 0.2 points at gamma 0.9 and 4 at 0.5, and ``seed_rate="candidates"`` 42 and 24, which is
    all that it had. With ``guide="predicted"``, which is not in the paper, the blocks are a
    function of the image and hold nothing that the image does not; but a prediction that is nearly
    always right is nearly the label, and networks leaned on it too (2 and 15 points at the rates
    of ``"candidates"``). Classes drawn at random guided as well and left nothing to read.

    The prediction costs a forward of the batch in eval mode without gradients, which
    :class:`~timm_structdrop.training.StructDropTask` makes before each step. The running
    statistics of batch norm that it reads count a forward twice that gradient checkpointing
    repeats, so that it may predict, and drop, otherwise there.

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
