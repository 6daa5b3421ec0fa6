"""CamDrop against Eqs. (5) to (10) of the paper written as loops, and against its statistics."""

import copy
import itertools
import json
import math
import pickle
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from timm_structdrop.layers import CamDrop2d, Step, cam_drop_2d
from timm_structdrop.layers.blocks import clamp_block, paper_rate
from timm_structdrop.layers.camdrop import (
    candidate_pixels,
    compress,
    dominant_channels,
    guidance,
    how_many_pixels,
)
from timm_structdrop.layers.dropblock import drop_dense_blocks

MAPS = [
    ((14, 14), 7),
    ((14, 14), 4),
    ((7, 7), 7),
    ((8, 8), 8),
    ((5, 12), 3),
    ((9, 4), 4),
    ((4, 7), 20),
    ((1, 1), 7),
    ((3, 1), 2),
    ((6, 5), 1),
]
maps = pytest.mark.parametrize(("size", "block_size"), MAPS)

# Eqs. (4) to (9) to the letter; the default is the authors' reading
LETTER = {"rank": "valid", "seed_rate": "candidates"}


def compress_loop(alpha, channels):
    """Eq. (7) for one sample, a list; repetition where the layer is wider than the classifier."""
    group = len(alpha) // channels
    if group == 0:
        return [alpha[c * len(alpha) // channels] for c in range(channels)]
    return [sum(alpha[c * group + j] for j in range(group)) for c in range(channels)]


def candidates_loop(x, alpha, block_size, guide, channels, n_channels, n_pixels, rank):
    """Eqs. (5) to (9) for one sample x (C, H, W): its candidate pixels and channels, as sets."""
    n_maps, height, width = x.shape
    rows, cols = min(block_size, height), min(block_size, width)
    values = x.double().tolist()
    if guide == "cam":
        weights = compress_loop(alpha.double().tolist(), n_maps)
        mixing = weights
    else:
        weights = [sum(map(sum, values[c])) / (height * width) for c in range(n_maps)]
        mixing = [1 / n_maps] * n_maps
    intensity = {}
    valid = set()
    for i in range(height):
        for j in range(width):
            intensity[i, j] = sum(mixing[c] * values[c][i][j] for c in range(n_maps))
            top, left = i - (rows - 1) // 2, j - (cols - 1) // 2
            if top >= 0 and left >= 0 and top + rows <= height and left + cols <= width:
                valid.add((i, j))
    ranked = list(intensity) if rank == "all" else sorted(valid)
    n = max(1, height * width // (rows * cols)) if n_pixels is None else n_pixels
    best = sorted(ranked, key=lambda pixel: -intensity[pixel])[:n]
    n_best = n_maps if channels == "all" else max(1, n_maps // 8)
    if channels != "all" and n_channels is not None:
        n_best = n_channels if isinstance(n_channels, int) else max(1, int(n_channels * n_maps))
    order = sorted(range(n_maps), key=lambda c: -weights[c])
    return {pixel for pixel in best if pixel in valid}, set(order[:n_best])


def blocks_loop(x, seeds, block_size):
    """Zero the block around each seed (b, c, i, j), then Eq. (10) for each sample."""
    batch, _, height, width = x.shape
    rows, cols = min(block_size, height), min(block_size, width)
    out = torch.empty_like(x)
    for b in range(batch):
        mask = torch.ones_like(x[b])
        for c, i, j in (seed[1:] for seed in seeds if seed[0] == b):
            top, left = i - (rows - 1) // 2, j - (cols - 1) // 2
            mask[c, top : top + rows, left : left + cols] = 0.0
        out[b] = x[b] * mask * mask.numel() / max(float(mask.sum()), 1.0)
    return out


def sample(size, batch=3, channels=16, features=40, seed=0):
    torch.manual_seed(seed)
    return torch.randn(batch, channels, *size), torch.randn(batch, features)


SETTINGS = [
    dict(zip(("guide", "channels", "n_channels", "n_pixels", "rank"), values, strict=True))
    for values in [
        ("cam", "dominant", None, None, "valid"),
        ("cam", "dominant", None, None, "all"),
        ("cam", "dominant", 3, 2, "valid"),
        ("cam", "dominant", 0.5, 5, "all"),
        ("cam", "all", None, None, "valid"),
        ("cam", "all", None, 10**6, "all"),
        ("avg", "dominant", 0.9, 3, "valid"),
        ("avg", "dominant", 99, None, "all"),
    ]
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize(("channels", "features"), [(16, 40), (5, 7), (1, 1), (3, 3)])
@maps
def test_every_candidate_and_nothing_else_can_seed(
    size, block_size, channels, features, settings, monkeypatch
):
    """Where each draw succeeds, the blocks are those of the loops' candidates."""
    x, alpha = sample(size, channels=channels, features=features)
    seeds = []
    for b in range(len(x)):
        pixels, chosen = candidates_loop(x[b], alpha[b], block_size, **settings)
        seeds += [(b, c, i, j) for c in chosen for i, j in pixels]
    monkeypatch.setattr(torch, "rand", lambda shape, **kwargs: torch.zeros(shape))
    out = cam_drop_2d(x, alpha, 0.1, block_size, **settings)
    torch.testing.assert_close(out, blocks_loop(x, seeds, block_size))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rate", [0.1, 0.6, 0.99])
@pytest.mark.parametrize("rank", ["valid", "all"])
@maps
def test_seeds_grow_blocks_and_samples_are_normalised(size, block_size, rank, rate, memory_format):
    """The loops on the seeds that the next call draws; output and gradient."""
    x, alpha = sample(size, batch=4)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    block = clamp_block(block_size, size)
    weights, intensity = guidance(x.detach(), alpha, "cam")
    n = how_many_pixels(size, block, None, rank)
    pixels = candidate_pixels(intensity, block, n, rank)
    chosen = weights.topk(2, dim=1, sorted=False).indices
    grid_width = size[1] if rank == "all" else size[1] - block[1] + 1
    shift = (0, 0) if rank == "all" else ((block[0] - 1) // 2, (block[1] - 1) // 2)
    with torch.random.fork_rng(devices=[]):
        drawn = torch.rand(4, 2, n) < rate * size[0] * size[1] / (block[0] * block[1] * n)
    seeds = []
    for b, k, place in drawn.nonzero().tolist():
        cell = place if pixels is None else int(pixels[b, place])
        i, j = cell // grid_width + shift[0], cell % grid_width + shift[1]
        if rank == "valid" or (
            (block[0] - 1) // 2 <= i < size[0] - block[0] // 2
            and (block[1] - 1) // 2 <= j < size[1] - block[1] // 2
        ):
            seeds.append((b, int(chosen[b, k]), i, j))
    out = cam_drop_2d(x, alpha, rate, block_size, rank=rank, seed_rate="candidates")
    expected = blocks_loop(x, seeds, block_size)
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(out, x, direction)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x, direction)[0])
    if math.prod(size) > 3:  # the strides of thin maps fit both formats
        assert out.is_contiguous(memory_format=memory_format)


@maps
def test_with_all_seeds_and_all_channels_it_is_dropblock(size, block_size):
    """The same seed draws the same mask as DropBlock at Eq. (1); only Eq. (10) is per sample."""
    x, alpha = sample(size)
    rate = paper_rate(0.3, size, block_size)
    for seed_rate in ("candidates", "dropblock"):
        torch.manual_seed(1)
        out = cam_drop_2d(
            x,
            alpha,
            0.3,
            block_size,
            channels="all",
            n_pixels=10**6,
            rank="valid",
            seed_rate=seed_rate,
        )
        torch.manual_seed(1)
        expected = drop_dense_blocks(x, clamp_block(block_size, size), rate)
        assert torch.equal(out == 0, expected == 0)


@pytest.mark.parametrize(("size", "block_size"), [((14, 14), 7), ((5, 12), 3), ((9, 4), 4)])
def test_with_all_seeds_and_all_channels_units_drop_as_often_as_in_algorithm_1(size, block_size):
    """Unit (i, j), covered by m seed positions, drops with probability 1 - (1 - Eq. (1))^m."""
    torch.manual_seed(0)
    batch, channels, p = 200, 64, 0.2
    x, alpha = torch.ones(batch, channels, *size), torch.randn(batch, channels)
    out = cam_drop_2d(x, alpha, p, block_size, channels="all", n_pixels=10**6)
    often = (out == 0).float().mean((0, 1))
    rows, cols = clamp_block(block_size, size)
    n_valid = (size[0] - rows + 1) * (size[1] - cols + 1)
    gamma = p / (rows * cols) * size[0] * size[1] / n_valid
    for i, j in itertools.product(range(size[0]), range(size[1])):
        covering = sum(
            top <= i < top + rows and left <= j < left + cols
            for top in range(size[0] - rows + 1)
            for left in range(size[1] - cols + 1)
        )
        expected = 1 - (1 - gamma) ** covering
        bound = 5 * math.sqrt(expected * (1 - expected) / (batch * channels))
        assert abs(float(often[i, j]) - expected) < bound


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("seed_rate", ["candidates", "dropblock"])
def test_how_often_a_candidate_seeds(seed_rate, p):
    """4 candidates on a 14 x 14 map, block 7: the paper's 1 - gamma, or DropBlock's Eq. (1)."""
    torch.manual_seed(0)
    batch, channels = 500, 64
    x, alpha = torch.randn(batch, channels, 14, 14), torch.randn(batch, channels)
    out = cam_drop_2d(x, alpha, p, 7, rank="valid", seed_rate=seed_rate)
    touched = (out == 0).any(-1).any(-1)
    assert int(touched.sum(1).max()) <= 8  # n' = 64 / 8
    rate = p if seed_rate == "candidates" else p * 14 * 14 / (7 * 7 * 8 * 8)
    expected = 1 - (1 - rate) ** 4
    bound = 5 * math.sqrt(expected * (1 - expected) / (batch * 8))
    assert abs(float(touched.float().sum()) / (batch * 8) - expected) < bound


def test_pairs_of_a_pixel_and_a_channel_are_drawn_independently():
    """Blocks of one unit: each pair of 5 pixels and 8 channels drops at p H W / 5, no other."""
    torch.manual_seed(0)
    x, alpha = sample((6, 5), batch=1, channels=64)
    pixels, chosen = candidates_loop(
        x[0], alpha[0], 1, "cam", "dominant", None, n_pixels=5, rank="valid"
    )
    draws, p = 4000, 0.05
    out = cam_drop_2d(
        x.expand(draws, -1, -1, -1), alpha.expand(draws, -1), p, block_size=1, n_pixels=5, **LETTER
    )
    dropped = (out == 0).float()
    often = dropped.mean(0)
    rate = p * 6 * 5 / 5
    bound = 5 * math.sqrt(rate * (1 - rate) / draws)
    for c in range(64):
        for i, j in itertools.product(range(6), range(5)):
            expected = rate if c in chosen and (i, j) in pixels else 0.0
            assert abs(float(often[c, i, j]) - expected) <= bound * (expected > 0)
    inside = dropped[:, sorted(chosen)].flatten(1)
    inside = inside[:, inside.any(0)]
    correlation = torch.corrcoef(inside.T) - torch.eye(40)
    assert float(correlation.abs().max()) < 5.5 / math.sqrt(draws)


def test_the_rank_of_all_pixels_drops_nothing_where_the_best_pixels_hold_no_block():
    x = torch.zeros(2, 8, 7, 7)
    x[:, :, 0, 0] = 1.0
    x += 0.01
    alpha = torch.ones(2, 8)
    assert torch.equal(cam_drop_2d(x, alpha, 0.9, 3, n_pixels=1), x)
    assert (cam_drop_2d(x, alpha, 0.9, 3, n_pixels=1, **LETTER) == 0).any()


def test_the_dropped_block_is_where_the_class_is_seen():
    x = torch.zeros(1, 8, 9, 9) + 0.01
    x[0, 5, 6, 2] = 4.0  # rows 5-7, columns 1-3 with a block of 3
    alpha = torch.zeros(1, 8)
    alpha[0, 5] = 1.0
    # the rate is 0.99 * 9 > 1
    out = cam_drop_2d(x, alpha, 0.99, 3, n_pixels=1, seed_rate="candidates")
    assert (out == 0).nonzero().tolist() == [[0, 5, i, j] for i in (5, 6, 7) for j in (1, 2, 3)]


def test_an_even_block_reaches_further_below_its_seed():
    x = torch.full((1, 1, 8, 8), 0.01)
    x[0, 0, 3, 4] = 4.0
    out = cam_drop_2d(x, torch.ones(1, 1), 0.99, 4, n_pixels=1)
    assert sorted({i for _, _, i, _ in (out == 0).nonzero().tolist()}) == [2, 3, 4, 5]
    assert sorted({j for _, _, _, j in (out == 0).nonzero().tolist()}) == [3, 4, 5, 6]


@pytest.mark.parametrize("features", [1, 3, 7, 16, 40, 2048])
@pytest.mark.parametrize("channels", [1, 3, 7, 16])
def test_compress_is_equation_7(features, channels):
    torch.manual_seed(0)
    alpha = torch.randn(4, features)
    expected = [compress_loop(row, channels) for row in alpha.tolist()]
    torch.testing.assert_close(compress(alpha, channels), torch.tensor(expected))


def test_how_many_channels_are_dominant():
    counts = [dominant_channels(64, n) for n in (None, 1 / 16, 1 / 4, 1 / 2, 1, 5, 100)]
    assert counts == [8, 4, 16, 32, 1, 5, 64]
    assert [dominant_channels(3, n) for n in (None, 0.1, 1, 7)] == [1, 1, 1, 3]


def test_a_sample_that_loses_everything_is_zero_and_not_nan():
    x = torch.ones(2, 3, 4, 4, dtype=torch.float16)
    out = cam_drop_2d(x, torch.ones(2, 3), 0.99, 4, channels="all", **LETTER)
    assert torch.isfinite(out).all()
    assert (out == 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_ranks_and_counts_in_float32(dtype):
    """The same candidates as in float32, and a mean of one over more than 65504 units."""
    x, alpha = sample((14, 14), batch=2, channels=512, features=2048)
    x = x.to(dtype)
    torch.manual_seed(1)
    half = cam_drop_2d(x, alpha, 0.5)
    torch.manual_seed(1)
    whole = cam_drop_2d(x.float(), alpha, 0.5)
    assert half.dtype == dtype
    assert torch.equal(half == 0, (whole == 0) | (x == 0))
    torch.testing.assert_close(half.float(), whole, rtol=2e-2, atol=0)


def test_autocast_does_not_round_the_map():
    """One pixel is best by less than bfloat16 can tell."""
    x = torch.ones(1, 4, 5, 5)
    x[0, :, 3, 1] += 1e-5
    alpha = torch.ones(1, 4)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = cam_drop_2d(x, alpha, 0.99, 1, n_pixels=1)
        assert {tuple(unit[2:]) for unit in (out == 0).nonzero().tolist()} == {(3, 1)}


def test_no_gradient_flows_through_the_guidance():
    x, alpha = sample((7, 7))
    x.requires_grad_()
    alpha.requires_grad_()
    out = cam_drop_2d(x, alpha, 0.5, 3)
    out.sum().backward()
    assert alpha.grad is None
    torch.testing.assert_close(x.grad * x, out)  # linear in x: the mask times the scale


def test_second_derivatives():
    x, alpha = sample((4, 3), batch=1, channels=4)
    x = x.double().requires_grad_()

    def same_mask(x):
        torch.manual_seed(3)
        return cam_drop_2d(x, alpha, 0.9, 3, n_channels=2).square()

    assert torch.autograd.gradcheck(same_mask, x, eps=1e-7, atol=1e-5)
    assert torch.autograd.gradgradcheck(same_mask, x, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_compiled_it_drops_what_it_drops_in_eager_mode(settings):
    torch._dynamo.reset()
    x, alpha = sample((9, 6))
    x.requires_grad_()
    layer = CamDrop2d(0.4, block_size=3, **settings)
    layer.begin_step(Step(alpha=alpha))
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        out = call(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_a_compiled_step_is_not_compiled_again_for_another_rate_or_target():
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = CamDrop2d(0.4, block_size=3)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for step in range(6):
        x, alpha = sample((9, 6), seed=step)
        layer.scale_drop_prob(step / 5)
        layer.begin_step(Step(alpha=alpha))
        compiled(x)
        layer.begin_step(None)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:CamDrop2d. no target:UserWarning")  # that is the case tested
def test_without_a_target_averages_guide():
    x, alpha = sample((14, 14))
    outs = []
    for guide, cam in (("cam", None), ("avg", None), ("avg", alpha), ("cam", alpha)):
        layer = CamDrop2d(0.5, guide=guide)
        layer.begin_step(Step(alpha=cam))
        torch.manual_seed(1)
        outs.append(layer(x))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[3])


def test_a_missing_target_is_told_once_and_only_where_it_is_missed():
    x, alpha = sample((7, 7))
    layer = CamDrop2d(0.5)
    with pytest.warns(UserWarning, match=r"no target was given .*StructDropTask"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        CamDrop2d(0.5, guide="avg")(x)
        CamDrop2d(0.5).eval()(x)
        CamDrop2d(0.0)(x)
        layer = CamDrop2d(0.5)
        layer.begin_step(Step(alpha=alpha))
        layer(x)


def test_what_a_layer_needs_to_be_told():
    needed = {guide: CamDrop2d(guide=guide).needs_classes for guide in ("cam", "predicted", "avg")}
    assert needed == {"cam": "target", "predicted": "prediction", "avg": None}


def test_copies_do_not_hold_the_target_of_a_batch():
    _, alpha = sample((7, 7))
    layer = CamDrop2d(0.5, n_channels=0.25)
    layer.begin_step(Step(alpha=alpha))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.current_step().alpha is None
        assert twin.settings() == layer.settings()
    assert layer.current_step().alpha is not None
    assert json.loads(json.dumps(layer.settings())) == layer.settings()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size must be an integer of at least 1; got 0"),
        ({"guide": "grad"}, "guide must be 'cam' or ('predicted' or )?'avg'; got 'grad'"),
        ({"channels": "some"}, "channels must be 'dominant' or 'all'; got 'some'"),
        ({"rank": "best"}, "rank must be 'valid' or 'all'; got 'best'"),
        ({"seed_rate": "exact"}, "seed_rate must be 'candidates' or 'dropblock'; got 'exact'"),
        ({"n_channels": 0}, r"n_channels must be .* \(0, 1\) or None .*; got 0"),
        ({"n_channels": 1.0}, r"or None \(all of them are channels='all'\); got 1.0"),
        ({"n_channels": 1.5}, r"n_channels must be .* \(0, 1\) or None .*; got 1.5"),
        ({"n_channels": math.nan}, r"n_channels must be .* \(0, 1\) or None .*; got nan"),
        ({"n_channels": "few"}, r"n_channels must be .* \(0, 1\) or None .*; got 'few'"),
        ({"n_pixels": 0}, "n_pixels must be an integer of at least 1 or None; got 0"),
        ({"n_pixels": "few"}, "n_pixels must be an integer of at least 1 or None; got 'few'"),
        ({"drop_prob": 1.0}, r"drop_prob must be in \[0, 1\); got 1.0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        CamDrop2d(**settings)
    with pytest.raises(ValueError, match=message):
        cam_drop_2d(torch.ones(1, 2, 3, 3), torch.ones(1, 2), **settings)


@pytest.mark.parametrize(
    ("shape", "alpha", "message"),
    [
        ((2, 3, 4), torch.ones(2, 3), r"x must be \(B, C, H, W\); got \(2, 3, 4\)"),
        ((2, 3, 4, 4), None, r"alpha must be \(B, features\) with B = 2 .*; got None"),
        ((2, 3, 4, 4), torch.ones(3, 3), r"alpha must be .* B = 2 .*; got \(3, 3\)"),
        ((2, 3, 4, 4), torch.ones(2), r"alpha must be .* B = 2 .*; got \(2,\)"),
    ],
)
def test_shapes_that_do_not_fit(shape, alpha, message):
    with pytest.raises(ValueError, match=message):
        cam_drop_2d(torch.ones(shape), alpha)
