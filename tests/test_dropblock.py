"""DropBlock against Algorithm 1 of the paper written as loops, and against its own statistics."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from timm_structdrop.layers import DropBlock2d, drop_block_2d, seed_rate
from timm_structdrop.layers.blocks import clamp_block, grow_blocks, paper_rate
from timm_structdrop.layers.dropblock import (
    draw_map_seeds,
    draw_seeds,
    drop_dense_blocks,
    drop_shared_blocks,
    drop_sparse_blocks,
)

PATHS = {"sparse": drop_sparse_blocks, "dense": drop_dense_blocks}
MAPS = [
    ((14, 14), 5),
    ((14, 14), 7),
    ((7, 7), 3),
    ((7, 7), 7),
    ((5, 12), 3),
    ((9, 4), 4),
    ((4, 7), 20),
    ((1, 1), 7),
    ((3, 1), 2),
]


def algorithm_1(x, drawn):
    """Zero the block at each seed (b, c, i, j), then normalise; c is None for all channels."""
    mask = torch.ones_like(x)
    for b, c, i, j, rows, cols in drawn:
        mask[b, slice(None) if c is None else c, i : i + rows, j : j + cols] = 0.0
    return x * mask * mask.numel() / mask.sum().clamp(min=1.0)


def seeds_of_next_call(shape, block, rate, path, couple_channels=False):
    """The seeds that a path is going to draw, as a list; the generator is left as it was."""
    batch, channels, height, width = shape
    places = (height - block[0] + 1, width - block[1] + 1)
    with torch.random.fork_rng(devices=[]):
        if path == "sparse":
            seeds = draw_map_seeds(batch * channels, (height, width), block, rate)
            drawn = torch.zeros(batch * channels, places[0] * places[1], dtype=torch.bool)
            drawn[seeds.maps, seeds.places] = True
            drawn = drawn.view(batch, channels, *places)
        else:
            drawn = torch.rand(batch, 1 if couple_channels else channels, *places) < rate
    return [
        (b, None if couple_channels else c, i, j, *block) for b, c, i, j in drawn.nonzero().tolist()
    ]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.2, 0.7, 1.0])
@pytest.mark.parametrize(("size", "block_size"), MAPS)
def test_both_paths_are_algorithm_1(size, block_size, rate, path, memory_format):
    torch.manual_seed(0)
    x = torch.randn(3, 8, *size).contiguous(memory_format=memory_format).requires_grad_()
    block = clamp_block(block_size, size)
    expected = algorithm_1(x, seeds_of_next_call(x.shape, block, rate, path))
    out = PATHS[path](x, block, rate)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((out * weights).sum(), x)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(gradient, expected_gradient)
    if x.shape.numel() > 3 * 8 * 3:  # the strides of thin maps fit both formats
        assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.2, 1.0])
@pytest.mark.parametrize("path", ["shared", "dense"])
@pytest.mark.parametrize(("size", "block_size"), MAPS)
def test_coupled_channels_are_algorithm_1_with_shared_blocks(size, block_size, path, rate):
    torch.manual_seed(0)
    x = torch.randn(4, 6, *size)
    block = clamp_block(block_size, size)
    expected = algorithm_1(x, seeds_of_next_call(x.shape, block, rate, path, couple_channels=True))
    if path == "shared":
        out = drop_shared_blocks(x, block, rate)
    else:
        out = drop_dense_blocks(x, block, rate, couple_channels=True)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("size", [(9, 7), (40, 40)])
def test_coupled_channels_with_few_blocks_and_with_many(size):
    torch.manual_seed(0)
    x = torch.randn(4, 6, *size)
    seeds = seeds_of_next_call(x.shape, (3, 3), seed_rate(0.3, size, 3), "dense", True)
    out = drop_block_2d(x, 0.3, 3, couple_channels=True)
    torch.testing.assert_close(out, algorithm_1(x, seeds))


def test_the_gradient_may_come_in_any_layout():
    """Each of both formats forward, each backward, an expanded gradient, a sliced input."""
    block, rate = (2, 2), 0.2
    for seed, (sliced, x_format, grad_format) in enumerate(
        itertools.product(
            (False, True),
            (torch.contiguous_format, torch.channels_last),
            (torch.contiguous_format, torch.channels_last, None),
        )
    ):
        torch.manual_seed(seed)
        x = torch.randn(2, 6, 5, 4).contiguous(memory_format=x_format)
        x = (x[:, ::2] if sliced else x).requires_grad_()
        grad = torch.ones(()).expand(x.shape)
        if grad_format is not None:
            grad = torch.randn(x.shape).contiguous(memory_format=grad_format)
        expected = algorithm_1(x, seeds_of_next_call(x.shape, block, rate, "sparse"))
        out = drop_sparse_blocks(x, block, rate)
        torch.testing.assert_close(out, expected)
        (gradient,) = torch.autograd.grad(out, x, grad)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, x, grad)[0])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("path", [*PATHS, "shared"])
@pytest.mark.parametrize(("size", "block_size"), MAPS)
def test_the_fraction_dropped_is_drop_prob(size, block_size, path, p):
    """Maps are independent, so the mean over maps is within five standard errors of p."""
    torch.manual_seed(1)
    block, rate = clamp_block(block_size, size), seed_rate(p, size, block_size)
    if path == "shared":
        out = drop_shared_blocks(torch.ones(16 * 128, 1, *size), block, rate)
    else:
        out = PATHS[path](torch.ones(16, 128, *size), block, rate)
    dropped = (out == 0).float().mean(dim=(2, 3)).flatten()
    assert abs(float(dropped.mean()) - p) < 5 * float(dropped.std()) / math.sqrt(dropped.numel())


@pytest.mark.parametrize("couple_channels", [False, True])
@pytest.mark.parametrize("gamma", ["exact", "paper"])
def test_gamma_and_its_scale_reach_the_mask(gamma, couple_channels):
    """The rate of seeds, seen through 1 x 1 maps beside 2 x 2 blocks that overlap."""
    torch.manual_seed(2)
    size, block_size, p, gamma_scale = (6, 5), 2, 0.8, 0.25
    solve = seed_rate if gamma == "exact" else paper_rate
    rate = solve(p, size, block_size) * gamma_scale
    batch = 4000 if couple_channels else 250
    x = torch.ones(batch, 16, *size)
    out = drop_block_2d(x, p, block_size, gamma, couple_channels, gamma_scale)
    corner = (out[:, :, 0, 0] == 0).float()  # covered by one seed
    if couple_channels:
        corner = corner[:, 0]
    error = math.sqrt(rate * (1 - rate) / corner.numel())
    assert abs(float(corner.mean()) - rate) < 5 * error


def chi_square(counts, probabilities, n):
    return sum((counts.get(k, 0) - n * q) ** 2 / (n * q) for k, q in probabilities.items())


@pytest.mark.parametrize("path", [*PATHS, "compiled"])
def test_the_paths_draw_masks_with_the_same_probabilities(path):
    """All 12 masks of 2 x 2 blocks on a 3 x 3 map against their probabilities, counted exactly."""
    rate, n = 0.3, 20000
    probabilities = {}
    for seeds in itertools.product((0, 1), repeat=4):
        mask = torch.ones(3, 3)
        for s, drawn in enumerate(seeds):
            if drawn:
                mask[s // 2 : s // 2 + 2, s % 2 : s % 2 + 2] = 0.0
        key = tuple(mask.flatten().int().tolist())
        q = rate ** sum(seeds) * (1 - rate) ** (4 - sum(seeds))
        probabilities[key] = probabilities.get(key, 0.0) + q
    torch.manual_seed(3)
    x = torch.ones(100, n // 100, 3, 3)
    if path == "compiled":
        torch._dynamo.reset()
        drop = torch.compile(drop_dense_blocks, backend="aot_eager", fullgraph=True)
        out = drop(x, (2, 2), torch.tensor(rate))
    else:
        out = PATHS[path](x, (2, 2), rate)
    masks, counts = (out != 0).int().flatten(0, 1).flatten(1).unique(dim=0, return_counts=True)
    found = dict(zip(map(tuple, masks.tolist()), counts.tolist(), strict=True))
    assert set(found) <= set(probabilities)
    # the chi-square of k - 1 degrees of freedom has mean k - 1 and variance 2 (k - 1)
    degrees = len(probabilities) - 1
    assert chi_square(found, probabilities, n) < degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_seeds_are_independent_trials(chunk):
    """All 16 outcomes of 4 trials; a chunk of 1 draws the gaps one by one."""
    rate, n = 0.35, 5000
    torch.manual_seed(4)
    found = {}
    for _ in range(n):
        outcome = tuple(draw_seeds(4, rate, chunk).tolist())
        found[outcome] = found.get(outcome, 0) + 1
    probabilities = {
        tuple(i for i in range(4) if pattern[i]): math.prod(
            rate if drawn else 1 - rate for drawn in pattern
        )
        for pattern in itertools.product((0, 1), repeat=4)
    }
    assert chi_square(found, probabilities, n) < 15 + 5 * math.sqrt(30)


def test_seeds_at_the_ends_of_the_range():
    assert draw_seeds(5, 0.0).tolist() == []
    assert draw_seeds(0, 0.5).tolist() == []
    assert draw_seeds(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert draw_seeds(5, 1 - 1e-16).tolist() == [0, 1, 2, 3, 4]
    assert draw_seeds(5, 1e-300).tolist() == []


@pytest.mark.parametrize("seeds", ["valid", "all"])
@pytest.mark.parametrize(("size", "block_size"), MAPS)
def test_blocks_grow_from_seeds(size, block_size, seeds):
    height, width = size
    rows, cols = clamp_block(block_size, size)
    area = (height - rows + 1, width - cols + 1) if seeds == "valid" else size
    drawn = torch.rand(2, 3, *area, generator=torch.Generator().manual_seed(5)) < 0.15
    expected = torch.zeros(2, 3, height, width, dtype=torch.bool)
    before = (0, 0) if seeds == "valid" else ((rows - 1) // 2, (cols - 1) // 2)
    for b, c, r, s in drawn.nonzero().tolist():
        for i in range(r - before[0], r - before[0] + rows):
            for j in range(s - before[1], s - before[1] + cols):
                if 0 <= i < height and 0 <= j < width:
                    expected[b, c, i, j] = True
    assert torch.equal(grow_blocks(drawn, (rows, cols), seeds), expected)


@pytest.mark.parametrize("couple_channels", [False, True])
def test_masks_differ_between_samples_and_unless_coupled_between_channels(couple_channels):
    torch.manual_seed(6)
    dropped = drop_block_2d(torch.ones(8, 8, 9, 9), 0.5, 3, couple_channels=couple_channels) == 0
    assert len(dropped.flatten(1).unique(dim=0)) == 8
    assert len(dropped[0].flatten(1).unique(dim=0)) == (1 if couple_channels else 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_half_precision(path, dtype):
    """More than 65504 units are kept: a count in float16 would overflow."""
    torch.manual_seed(7)
    x = torch.ones(16, 128, 8, 8, dtype=dtype)
    out = PATHS[path](x, (3, 3), seed_rate(0.1, (8, 8), 3))
    kept = out != 0
    assert out.dtype == dtype
    expected = torch.full((), kept.numel() / int(kept.sum()), dtype=dtype)
    assert torch.equal(out[kept], expected.expand(int(kept.sum())))


@pytest.mark.parametrize("path", PATHS)
def test_half_precision_does_not_round_the_rate(path):
    """A uniform number in float16 is below 0.001 far too often; the bound is binomial."""
    torch.manual_seed(7)
    rate, n = 0.001, 400_000
    out = PATHS[path](torch.ones(400, 1000, 1, 1, dtype=torch.float16), (1, 1), rate)
    assert abs(int((out == 0).sum()) - n * rate) < 5 * math.sqrt(n * rate)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_kept_gives_zeros_and_no_images_give_none(path, dtype):
    x = torch.randn(64, 64, 5, 5, dtype=dtype, requires_grad=True)
    out = PATHS[path](x, (2, 2), 1.0)
    assert torch.equal(out, torch.zeros_like(out))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert PATHS[path](x[:0], (2, 2), 0.5).shape == (0, 64, 5, 5)


def test_it_is_the_identity_in_eval_and_at_rate_zero():
    x = torch.randn(2, 3, 8, 8)
    assert drop_block_2d(x, 0.5, 3, training=False) is x
    assert drop_block_2d(x, 0.0, 3) is x
    layer = DropBlock2d(0.5, 3)
    assert layer.eval()(x) is x
    layer.train().scale_drop_prob(0.0)
    assert layer(x) is x


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("path", PATHS)
def test_gradients_of_gradients(path, memory_format):
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64).contiguous(memory_format=memory_format)

    def penalised(x):
        torch.manual_seed(8)
        return PATHS[path](x, (2, 3), 0.15).pow(3)

    assert 0 < int((penalised(x) == 0).sum()) < x.numel()
    assert torch.autograd.gradgradcheck(penalised, x.requires_grad_())


@pytest.mark.parametrize("path", ["sparse", "dense", "coupled"])
def test_what_waits_for_the_backward_pass_is_small(path):
    """The sparse path keeps little more than the seeds, whatever the size of the activations."""
    torch.manual_seed(8)
    x = torch.randn(8, 64, 14, 14, requires_grad=True)
    kept = []

    def count(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        if path == "coupled":
            drop_block_2d(x, 0.1, 7, couple_channels=True)
        else:
            PATHS[path](x, (7, 7), seed_rate(0.1, (14, 14), 7))
    of_activations = x.numel() * x.element_size()
    limit = {"sparse": 0.5, "dense": 1.0, "coupled": 1 / 64}[path]
    assert sum(kept) <= limit * of_activations


@pytest.mark.parametrize("settings", [{}, {"couple_channels": True}, {"gamma": "paper"}])
def test_compiled_it_follows_the_rate_without_recompiling(settings):
    torch._dynamo.reset()
    torch.manual_seed(9)
    counter = CompileCounter()
    layer = DropBlock2d(0.4, 3, **settings)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.ones(512, 8, 8, 8)
    for factor in (0.0, 0.25, 0.5, 1.0):
        layer.scale_drop_prob(factor)
        dropped = (compiled(x) == 0).float().mean(dim=(1, 2, 3))
        p = 0.4 * factor
        error = float(dropped.std()) / math.sqrt(len(dropped))
        if settings.get("gamma") == "paper" and factor:
            assert 0.7 * p < float(dropped.mean()) < p
        else:
            assert abs(float(dropped.mean()) - p) <= 5 * error
    assert counter.frame_count == 1


def test_compiled_it_takes_maps_of_any_size():
    torch._dynamo.reset()
    torch.manual_seed(10)
    compiled = torch.compile(DropBlock2d(0.3, 3), backend="eager", fullgraph=True, dynamic=True)
    for shape in ((300, 7, 9, 8), (200, 20, 5, 11)):
        dropped = (compiled(torch.ones(shape)) == 0).float().mean(dim=(2, 3)).flatten()
        error = float(dropped.std()) / math.sqrt(len(dropped))
        assert abs(float(dropped.mean()) - 0.3) <= 5 * error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop_prob": 1.0}, r"drop_prob must be in \[0, 1\); got 1.0"),
        ({"drop_prob": -0.1}, r"drop_prob must be in \[0, 1\); got -0.1"),
        ({"block_size": 0}, "block_size must be an integer of at least 1; got 0"),
        ({"block_size": 3.5}, "block_size must be an integer of at least 1; got 3.5"),
        ({"gamma": "best"}, "gamma must be 'exact' or 'paper'; got 'best'"),
        ({"gamma_scale": 0.0}, r"gamma_scale must be in \(0, 1\]; got 0.0"),
        ({"gamma_scale": 4.0}, r"gamma_scale must be in \(0, 1\]; got 4.0"),
        ({"drop_prob": [0.1]}, r"drop_prob must be a number in \[0, 1\); got \[0.1\]"),
        ({"block_size": [3]}, r"block_size must be an integer of at least 1; got \[3\]"),
        ({"gamma": ["exact"]}, r"gamma must be 'exact' or 'paper'; got \['exact'\]"),
        ({"gamma_scale": "all"}, r"gamma_scale must be a number in \(0, 1\]; got 'all'"),
    ],
)
def test_wrong_settings_state_the_rule_and_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        DropBlock2d(**settings)
    with pytest.raises(ValueError, match=message):
        drop_block_2d(torch.ones(1, 1, 4, 4), **settings)


def test_numbers_may_come_from_numpy_and_whole_ones_as_floats():
    x = torch.ones(2, 3, 8, 8)
    settings = {"drop_prob": np.array(0.2), "block_size": 3.0}
    layer = DropBlock2d(**settings)
    assert layer.settings() == DropBlock2d(0.2, 3).settings()
    for drop in (layer, partial(drop_block_2d, **settings)):
        torch.manual_seed(0)
        dropped = drop(x)
        torch.manual_seed(0)
        assert torch.equal(dropped, drop_block_2d(x, 0.2, 3))


def test_an_input_without_four_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\); got \(3, 8, 8\)"):
        drop_block_2d(torch.ones(3, 8, 8))
