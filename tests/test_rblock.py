"""R-Block's sub models against Algorithms 1 and 2 written as loops, and their statistics."""

import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from timm_structdrop.layers import SUB_MODELS, Fork, RBlock2d, Step, r_block_2d, seed_rate
from timm_structdrop.layers.blocks import paper_rate
from timm_structdrop.layers.rblock import b_drop_dml, drop, one_of_both, s_drop_dml
from timm_structdrop.training.steps import repeat_in_backward

MAPS = [((8, 8), 3), ((5, 9), 3), ((4, 4), 2), ((7, 4), 4), ((3, 5), 20), ((1, 1), 3), ((6, 1), 3)]
PAIRS = ("sdropdml", "bdropdml")


def corner_and_size(size, block_size):
    return min(block_size, size[0]), min(block_size, size[1])


def algorithm_1(r, l1, size, block_size):
    """M^1, M^2 of one sample before the normalisation, (C, H, W); r says where seeds are."""
    rows, cols = corner_and_size(size, block_size)
    blocks = torch.zeros(size)
    for i, j in r.nonzero().tolist():
        blocks[i : i + rows, j : j + cols] = 1.0
    masks = []
    for own in (l1, 1 - l1):
        mask = torch.ones(len(l1), *size)
        for k in range(len(l1)):
            mask[k] -= blocks * own[k]
        masks.append(mask)
    return masks


def algorithm_2(r, selected, size, block_size):
    rows, cols = corner_and_size(size, block_size)
    blocks = torch.zeros(size)
    for i, j in r.nonzero().tolist():
        top, left = i - (rows - 1) // 2, j - (cols - 1) // 2
        for row in range(max(top, 0), min(top + rows, size[0])):
            for col in range(max(left, 0), min(left + cols, size[1])):
                blocks[row, col] = 1.0
    masks = []
    for region in (blocks, 1 - blocks):
        mask = torch.ones(len(selected), *size)
        for k in range(len(selected)):
            mask[k] -= region * selected[k]
        masks.append(mask)
    return masks


def normalise(mask):
    ones = float(mask.sum())
    return mask / (ones / mask.numel()) if ones else mask


def expected_output(x, masks_1, masks_2):
    halves = x.chunk(2)
    out = [
        torch.stack([a * normalise(m) for a, m in zip(half, masks, strict=True)])
        for half, masks in zip(halves, (masks_1, masks_2), strict=True)
    ]
    return torch.cat(out)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("size", "block_size"), MAPS)
@pytest.mark.parametrize("sub_models", PAIRS)
def test_a_forked_batch_goes_through_the_papers_masks(
    sub_models, size, block_size, p, memory_format
):
    batch, channels = 3, 6
    x = torch.randn(2 * batch, channels, *size).contiguous(memory_format=memory_format)
    x.requires_grad_()
    rows, cols = corner_and_size(size, block_size)
    torch.manual_seed(3)
    if sub_models == "bdropdml":
        fits = (batch, 1, size[0] - rows + 1, size[1] - cols + 1)
        r = torch.rand(fits)[:, 0] < paper_rate(p, size, block_size)
        chosen = (torch.rand(batch, channels) < 0.5).float()
        algorithm = algorithm_1
    else:
        chosen = (torch.rand(batch, channels) < p).float()
        r = torch.rand(batch, 1, *size)[:, 0] < seed_rate(0.5, size, block_size, seeds="all")
        algorithm = algorithm_2
    pairs = [algorithm(r[b], chosen[b], size, block_size) for b in range(batch)]
    expected = expected_output(x, [a for a, _ in pairs], [b for _, b in pairs])
    torch.manual_seed(3)
    out = r_block_2d(x, p, sub_models, block_size, forked=True)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    gradient = torch.autograd.grad((out * weights).sum(), x)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * weights).sum(), x)[0])


def rate_by_the_paper(gamma, p, size, block_size):
    """Eqs. (6) and (7), the block cut to the map."""
    (m, n), (rows, cols) = size, corner_and_size(size, block_size)
    if gamma == "eq6":
        return p / (rows * cols)
    return m * n * p / (rows * cols * (m - rows + 1) * (n - cols + 1))


@pytest.mark.parametrize("gamma", ["eq6", "paper"])
@pytest.mark.parametrize(("size", "block_size"), MAPS)
@pytest.mark.parametrize("seeds", ["valid", "all"])
def test_bdropdml_by_either_equation_with_seeds_in_both_places(seeds, size, block_size, gamma):
    batch, channels, p = 3, 6, 0.5
    x = torch.randn(2 * batch, channels, *size)
    rows, cols = corner_and_size(size, block_size)
    torch.manual_seed(4)
    places = size if seeds == "all" else (size[0] - rows + 1, size[1] - cols + 1)
    rate = rate_by_the_paper(gamma, p, size, block_size)
    r = torch.rand(batch, 1, *places)[:, 0] < rate
    l1 = (torch.rand(batch, channels) < 0.5).float()
    first, second = [], []
    for b in range(batch):
        if seeds == "valid":
            pair = algorithm_1(r[b], l1[b], size, block_size)
        else:  # blocks with the seeds as their middles, in the channels of l1 and of 1 - l1
            pair = [algorithm_2(r[b], own, size, block_size)[0] for own in (l1[b], 1 - l1[b])]
        first.append(pair[0])
        second.append(pair[1])
    torch.manual_seed(4)
    out = r_block_2d(x, p, "bdropdml", block_size, gamma, forked=True, seeds=seeds)
    torch.testing.assert_close(out, expected_output(x, first, second))
    layer = RBlock2d(p, "bdropdml", block_size, gamma, seeds)
    layer.begin_step(Step(forked=True))
    torch.manual_seed(4)
    assert torch.equal(layer(x), out)


@pytest.mark.parametrize("gamma", ["eq6", "paper", "exact"])
@pytest.mark.parametrize(("size", "block_size"), [((8, 8), 3), ((5, 9), 2), ((4, 3), 3)])
def test_bdropdml_with_seeds_everywhere_drops_what_its_seed_rate_makes_it(size, block_size, gamma):
    p, (height, width) = 0.4, size
    before, after = (block_size - 1) // 2, block_size // 2
    covered = p
    if gamma != "exact":
        rate, covered = rate_by_the_paper(gamma, p, size, block_size), 0.0
        for i in range(height):
            for j in range(width):
                seeds_i = [s for s in range(height) if s - before <= i <= s + after]
                seeds_j = [s for s in range(width) if s - before <= j <= s + after]
                n = len(seeds_i) * len(seeds_j)
                covered += (1 - (1 - rate) ** n) / (height * width)
    settings = {"gamma": gamma, "seeds": "all"}
    one, two, both = dropped_fractions("bdropdml", p, size, block_size, **settings)
    bound = 5 * math.sqrt(covered / 2 / (40 * 64))
    assert abs(one - covered / 2) < bound and abs(two - covered / 2) < bound
    assert both == 0.0


def dropped_fractions(
    sub_models, p, size, block_size, gamma=None, draws=40, batch=64, seeds="valid"
):
    """Fraction of zeros in each half, and of units that both drop, over many forked draws."""
    torch.manual_seed(0)
    x = torch.ones(2 * batch, 8, *size)
    one = two = both = 0.0
    for _ in range(draws):
        out = r_block_2d(x, p, sub_models, block_size, gamma, forked=True, seeds=seeds) == 0
        one += float(out[:batch].float().mean()) / draws
        two += float(out[batch:].float().mean()) / draws
        both += float((out[:batch] & out[batch:]).float().mean()) / draws
    return one, two, both


@pytest.mark.parametrize(("size", "block_size"), MAPS)
@pytest.mark.parametrize("sub_models", PAIRS)
def test_both_sub_models_drop_half_of_p_and_never_the_same_unit(sub_models, size, block_size):
    p = 0.3
    one, two, both = dropped_fractions(sub_models, p, size, block_size, "exact")
    # at worst the masks of a sample are all or nothing: 40 * 64 draws of a fraction in [0, 1]
    bound = 5 * math.sqrt(p / 2 / (40 * 64))
    assert abs(one - p / 2) < bound and abs(two - p / 2) < bound
    assert both == 0.0


@pytest.mark.parametrize(("size", "block_size"), [((8, 8), 3), ((4, 4), 3), ((5, 9), 2)])
def test_bdropdml_by_eq_7_drops_what_its_seed_rate_makes_it(size, block_size):
    p = 0.5
    height, width = size
    gamma = (
        height * width * p / (block_size**2 * (height - block_size + 1) * (width - block_size + 1))
    )
    covered = 0.0
    for i in range(height):
        for j in range(width):
            seeds_i = [s for s in range(height - block_size + 1) if s <= i < s + block_size]
            seeds_j = [s for s in range(width - block_size + 1) if s <= j < s + block_size]
            covered += (1 - (1 - gamma) ** (len(seeds_i) * len(seeds_j))) / (height * width)
    one, two, _ = dropped_fractions("bdropdml", p, size, block_size)
    bound = 5 * math.sqrt(covered / 2 / (40 * 64))
    assert covered < 0.45
    assert abs(one - covered / 2) < bound and abs(two - covered / 2) < bound


@pytest.mark.parametrize("sub_models", ["r-dropblock", "r-spatialdropout", "r-drop", "c-drop"])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_other_sub_models_drop_p_each(sub_models, p):
    one, two, both = dropped_fractions(sub_models, p, (6, 5), 3)
    bound = 5 * math.sqrt(p / (40 * 64))
    assert abs(one - p) < bound and abs(two - p) < bound
    if sub_models == "c-drop":
        assert both == 0.0
        assert p < 0.5 or one + two == pytest.approx(1.0, abs=1e-6)
    else:
        assert abs(both - p * p) < bound


def test_c_drop_above_one_half_overlaps_and_keeps_its_rate():
    one, two, both = dropped_fractions("c-drop", 0.7, (6, 5), 3)
    assert (one, two, both) == pytest.approx((0.7, 0.7, 0.4), abs=0.01)


def test_spatialdropout_drops_whole_channels_and_dropblock_whole_blocks():
    x = torch.ones(64, 16, 6, 6)
    maps = (r_block_2d(x, 0.3, "r-spatialdropout", forked=True) == 0).flatten(2).float().mean(2)
    assert set(maps.unique().tolist()) == {0.0, 1.0}
    dropped = r_block_2d(x, 0.05, "r-dropblock", 3, forked=True) == 0
    sums = dropped.flatten(2).sum(2)
    assert set(sums[sums > 0].tolist()) >= {9} and int(sums[sums > 0].min()) == 9


@pytest.mark.parametrize("sub_models", SUB_MODELS)
@pytest.mark.parametrize("forked", [True, False])
def test_the_mean_of_a_map_of_ones_stays_one(sub_models, forked):
    torch.manual_seed(0)
    x = torch.ones(512, 32, 6, 6)
    out = r_block_2d(x, 0.3, sub_models, 3, forked=forked)
    assert float(out.mean()) == pytest.approx(1.0, abs=0.02)
    if sub_models in PAIRS:  # divided by the proportion of each sample
        torch.testing.assert_close(out.mean((1, 2, 3)), torch.ones(512))


def test_a_sample_with_nothing_kept_is_zero():
    torch.manual_seed(0)
    out = r_block_2d(torch.ones(64, 1, 1, 1), 0.99, "sdropdml", forked=True)
    assert torch.isfinite(out).all() and bool((out == 0).any())


@pytest.mark.parametrize("make", [b_drop_dml, s_drop_dml])
def test_unforked_each_sample_is_one_sub_model_by_a_fair_coin(make):
    torch.manual_seed(0)
    pair = make((2000, 4, 3, 3), 0.9)
    one = one_of_both(pair)
    first, second = (
        (one.channels == pair.channels[half]).all(1) & (one.space == pair.space[half]).all((1, 2))
        for half in (slice(0, 2000), slice(2000, None))
    )
    assert bool((first | second).all())
    told = first ^ second  # samples whose sub models differ
    assert abs(float(first[told].float().mean()) - 0.5) < 5 * 0.5 / math.sqrt(int(told.sum()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_half_precision_maps_do_not_overflow(dtype):
    x = torch.ones(4, 64, 56, 56, dtype=dtype)
    pair = s_drop_dml((2, 64, 56, 56), 0.2)
    out, exact = drop(x, pair), drop(x.float(), pair)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("sub_models", SUB_MODELS)
def test_compiled_forked_it_is_one_graph_whatever_the_rate(sub_models):
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = RBlock2d(0.4, sub_models)
    layer.begin_step(Step(forked=True))
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.ones(8, 12, 6, 5)
    for factor in (0.0, 0.5, 1.0):
        layer.scale_drop_prob(factor)
        out = compiled(x)
        assert bool((out == 0).any()) == (factor > 0)
    assert counter.frame_count == 1
    if sub_models in PAIRS:
        assert not bool(((out[:4] == 0) & (out[4:] == 0)).any())


@pytest.mark.parametrize("sub_models", PAIRS)
def test_the_rate_of_a_compiled_mask_is_that_of_an_eager_one(sub_models):
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled = torch.compile(r_block_2d, backend="eager", fullgraph=True)
    x = torch.ones(2000, 4, 6, 6)
    out = compiled(x, torch.tensor(0.4), sub_models, 3, "exact", True)
    for sub_model in out.chunk(2):
        assert float((sub_model == 0).float().mean()) == pytest.approx(0.2, abs=0.01)


class TestFork:
    def test_it_repeats_the_batch_in_training_while_asked(self):
        fork, x = Fork(), torch.randn(3, 2, 4, 5, requires_grad=True)
        fork.begin_step(Step(forked=True))
        out = fork(x)
        assert torch.equal(out, torch.cat([x, x]))
        out.backward(torch.ones_like(out))
        assert torch.equal(x.grad, torch.full_like(x, 2.0))
        assert fork.eval()(x) is x

    def test_unasked_it_is_the_identity_and_says_so_once(self):
        fork, x = Fork(), torch.randn(3, 2, 4, 5)
        with pytest.warns(UserWarning, match="trained without its task.*RBlockTask"):
            assert fork(x) is x
        assert fork(x) is x

    def test_in_eval_it_is_silent(self):
        x = torch.randn(1, 2, 4, 5)
        assert Fork().eval()(x) is x

    def test_it_keeps_channels_last(self):
        fork = Fork()
        fork.begin_step(Step(forked=True))
        out = fork(torch.randn(2, 4, 5, 3).contiguous(memory_format=torch.channels_last))
        assert out.is_contiguous(memory_format=torch.channels_last)

    def test_it_has_no_state(self):
        assert not Fork().state_dict() and not list(Fork().parameters())

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_a_recomputation_in_the_backward_pass_repeats_the_forward(self, use_reentrant):
        fork, layer, conv = Fork(), RBlock2d(0.5), nn.Conv2d(4, 4, 3, padding=1)
        x = torch.randn(2, 4, 6, 6, requires_grad=True)

        def segment(x):
            return conv(layer(fork(x))).relu()

        grads = []
        for checkpointed in (False, True):
            x.grad = conv.weight.grad = None
            torch.manual_seed(0)
            told = [(module, Step(forked=True)) for module in (fork, layer)]
            for module, step in told:
                module.begin_step(step)
            if checkpointed:
                out = torch.utils.checkpoint.checkpoint(segment, x, use_reentrant=use_reentrant)
            else:
                out = segment(x)
            for module, _ in told:
                module.begin_step(None)
            repeat_in_backward(told, [out])
            assert len(out) == 4
            out.square().sum().backward()
            grads.append((x.grad, conv.weight.grad))
        for plain, recomputed in zip(*grads, strict=True):
            torch.testing.assert_close(recomputed, plain)
        with pytest.warns(UserWarning, match="without its task"):
            assert fork(x) is x  # the backward pass leaves nothing behind
        assert not layer.current_step().forked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"sub_models": "bdropmdl"},
            r"sub_models must be one of sdropdml, .*; got 'bdropmdl' \(nearest: bdropdml",
        ),
        ({"gamma": "eq7"}, r"gamma must be 'paper', 'eq6', 'exact' or None; got 'eq7'"),
        ({"gamma": "eq6"}, r"gamma 'eq6' needs sub_models 'bdropdml'; got 'sdropdml'"),
        ({"seeds": "some"}, r"seeds must be 'valid' or 'all'; got 'some'"),
        ({"block_size": 0}, r"block_size must be an integer of at least 1; got 0"),
        ({"drop_prob": 1.0}, r"drop_prob must be in \[0, 1\); got 1.0"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        RBlock2d(**arguments)
    with pytest.raises(ValueError, match=message):
        r_block_2d(torch.ones(2, 1, 3, 3), **arguments)


@pytest.mark.parametrize("sub_models", SUB_MODELS)
def test_an_odd_forked_batch_is_refused(sub_models):
    layer = RBlock2d(sub_models=sub_models)
    layer.begin_step(Step(forked=True))
    with pytest.raises(ValueError, match="two sub models' samples, an even number; got 3"):
        layer(torch.ones(3, 2, 4, 4))


def test_maps_are_needed_where_blocks_are_dropped():
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\); got \(4, 8\)"):
        r_block_2d(torch.ones(4, 8), forked=True)
    assert r_block_2d(torch.ones(4, 8), 0.5, "r-drop", forked=True).shape == (4, 8)
