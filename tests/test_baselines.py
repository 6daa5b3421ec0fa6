"""Dropout, SpatialDropout and StochasticDepth: what they drop, how often and by what they scale."""

import math

import pytest
import torch
from timm.layers import DropPath

from timm_structdrop.layers import (
    SpatialDropout2d,
    StochasticDepth,
    UnitDropout2d,
    spatial_dropout_2d,
    stochastic_depth,
    unit_dropout_2d,
)

# what is dropped as a whole: the dimensions of the input along which the mask is constant
BASELINES = {
    "dropout": (unit_dropout_2d, UnitDropout2d, ()),
    "spatialdropout": (spatial_dropout_2d, SpatialDropout2d, (2, 3)),
    "stochasticdepth": (stochastic_depth, StochasticDepth, (1, 2, 3)),
}


def independent_units(out, together):
    """One unit of each group that is dropped as a whole, after checking that it is one."""
    for dim in together:
        first = out.narrow(dim, 0, 1)
        assert torch.equal(out, first.expand_as(out))
        out = first
    return out


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("of", [float, torch.tensor])
@pytest.mark.parametrize("name", BASELINES)
def test_groups_of_units_are_dropped_independently_with_probability_p(name, of, p):
    """The count is binomial; the bound is five standard deviations."""
    drop, _, together = BASELINES[name]
    torch.manual_seed(0)
    shape = (20000, 2, 1, 2) if name == "stochasticdepth" else (100, 100, 2, 3)
    units = independent_units(drop(torch.ones(shape), of(p)), together)
    kept = units != 0
    torch.testing.assert_close(units[kept], torch.full((int(kept.sum()),), 1 / (1 - p)))
    n = units.numel()
    assert abs(int((~kept).sum()) - n * p) < 5 * math.sqrt(n * p * (1 - p))
    # neighbours along the first dimension: equal as often as independent ones are
    same = (kept[1:] == kept[:-1]).float()
    q = p**2 + (1 - p) ** 2
    assert abs(float(same.mean()) - q) < 7 * math.sqrt(q * (1 - q) / same.numel())


@pytest.mark.parametrize("name", BASELINES)
def test_layer_and_function_draw_the_same_mask(name):
    drop, layer, _ = BASELINES[name]
    x = torch.randn(4, 6, 3, 5)
    torch.manual_seed(1)
    expected = drop(x, 0.4)
    torch.manual_seed(1)
    assert torch.equal(layer(0.4)(x), expected)
    assert not torch.equal(expected, x)
    assert drop(x, 0.4, training=False) is x
    assert drop(x, torch.tensor(0.4), training=False) is x


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_round_the_rate(name, dtype):
    """A uniform number in float16 or bfloat16 is below 0.001 far too often."""
    drop, _, together = BASELINES[name]
    torch.manual_seed(2)
    p = 0.001
    shape = (200000, 1, 1, 1) if name == "stochasticdepth" else (500, 400, 1, 1)
    units = independent_units(drop(torch.ones(shape, dtype=dtype), torch.tensor(p)), together)
    assert units.dtype == dtype
    n = units.numel()
    assert abs(int((units == 0).sum()) - n * p) < 5 * math.sqrt(n * p)


def test_stochastic_depth_is_timms_drop_path():
    """On any number of dimensions: the same values, with the same frequencies."""
    torch.manual_seed(3)
    for shape in ((20000, 3), (20000, 2, 2, 2)):
        ours = stochastic_depth(torch.ones(shape), 0.3)
        theirs = DropPath(0.3).train()(torch.ones(shape))
        values, ours_n = ours.unique(return_counts=True)
        their_values, theirs_n = theirs.unique(return_counts=True)
        torch.testing.assert_close(values, their_values)
        per_sample = math.prod(shape[1:])
        difference = int(ours_n[0] - theirs_n[0]) / per_sample
        assert abs(difference) < 5 * math.sqrt(2 * 20000 * 0.3 * 0.7)


@pytest.mark.parametrize("name", BASELINES)
def test_a_rate_out_of_range_is_refused(name):
    drop, layer, _ = BASELINES[name]
    for call in (layer, lambda p: drop(torch.ones(1, 1, 1, 1), p)):
        with pytest.raises(ValueError, match=r"drop_prob must be in \[0, 1\); got 1.0"):
            call(1.0)
