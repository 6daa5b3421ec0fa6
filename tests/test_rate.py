"""The seed rate against a count of covering seeds, a simulation and the papers' equations."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from timm_structdrop.layers import seed_rate
from timm_structdrop.layers.blocks import paper_rate, seed_rate_tensor

GRID = [
    ((14, 14), 5),
    ((14, 14), 7),
    ((7, 7), 3),
    ((7, 7), 7),
    ((5, 12), 3),
    ((12, 5), 4),
    ((6, 9), 2),
    ((3, 8), 5),
    ((2, 2), 7),
    ((1, 1), 1),
]


def block_of(seed, block, length, seeds):
    """The positions of one axis that the block of a seed covers."""
    if seeds == "valid":
        return range(seed, seed + block)
    first = seed - (block - 1) // 2
    return range(max(first, 0), min(first + block, length))


@functools.lru_cache
def covering_seeds(size, block_size, seeds):
    """n(i, j) by going through every seed and every unit of its block."""
    height, width = size
    rows, cols = min(block_size, height), min(block_size, width)
    n = [[0] * width for _ in range(height)]
    for r in range(height - rows + 1 if seeds == "valid" else height):
        for c in range(width - cols + 1 if seeds == "valid" else width):
            for i in block_of(r, rows, height, seeds):
                for j in block_of(c, cols, width, seeds):
                    n[i][j] += 1
    return n


def dropped_fraction(gamma, size, block_size, seeds):
    n = covering_seeds(size, block_size, seeds)
    units = [-math.expm1(k * math.log1p(-gamma)) for row in n for k in row]
    return math.fsum(units) / len(units)


@pytest.mark.parametrize("seeds", ["valid", "all"])
@pytest.mark.parametrize(("size", "block_size"), GRID)
@pytest.mark.parametrize("p", [1e-9, 0.05, 0.5, 0.9, 0.999])
def test_the_rate_drops_exactly_p(p, size, block_size, seeds):
    gamma = seed_rate(p, size, block_size, seeds)
    measured = dropped_fraction(gamma, size, block_size, seeds)
    assert measured == pytest.approx(p, rel=1e-13, abs=0.0)


@settings(max_examples=200, deadline=None)
@given(
    p=st.floats(0.0, 1.0, exclude_max=True),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    block_size=st.integers(1, 15),
    seeds=st.sampled_from(["valid", "all"]),
)
def test_every_rate_is_reachable_on_every_map(p, size, block_size, seeds):
    gamma = seed_rate(p, size, block_size, seeds)
    assert 0.0 <= gamma <= 1.0
    if gamma == 1.0:  # one seed in the corner, p rounds up
        assert p > 1 - 1e-13
    else:
        measured = dropped_fraction(gamma, size, block_size, seeds)
        # a gamma near 1 has few bits left for 1 - gamma
        assert measured == pytest.approx(p, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("seeds", ["valid", "all"])
@pytest.mark.parametrize(("size", "block_size"), [((7, 7), 3), ((6, 9), 4), ((3, 8), 5)])
def test_a_simulation_drops_p(size, block_size, seeds):
    """Draw seeds, mark blocks with a loop, count; bound: five standard errors."""
    height, width = size
    rows, cols = min(block_size, height), min(block_size, width)
    p, maps = 0.3, 3000
    gamma = seed_rate(p, size, block_size, seeds)
    area = (height - rows + 1, width - cols + 1) if seeds == "valid" else size
    drawn = torch.rand(maps, *area, generator=torch.Generator().manual_seed(0)) < gamma
    mask = torch.ones(maps, height, width)
    for m, r, c in drawn.nonzero().tolist():
        i, j = block_of(r, rows, height, seeds), block_of(c, cols, width, seeds)
        mask[m, i.start : i.stop, j.start : j.stop] = 0.0
    dropped = 1.0 - mask.mean(dim=(1, 2))
    error = float(dropped.std()) / math.sqrt(maps)
    assert abs(float(dropped.mean()) - p) < 5 * error


@pytest.mark.parametrize(("size", "block_size"), [((14, 14), 7), ((7, 7), 7), ((9, 13), 4)])
def test_small_rates_agree_with_equation_1_of_dropblock(size, block_size):
    keep_prob = 1 - 1e-6
    height, width = size
    valid = (height - block_size + 1) * (width - block_size + 1)
    equation_1 = (1 - keep_prob) / block_size**2 * height * width / valid
    assert seed_rate(1 - keep_prob, size, block_size) == pytest.approx(equation_1, rel=1e-4)
    assert paper_rate(1 - keep_prob, size, block_size) == pytest.approx(equation_1, rel=1e-12)
    # blocks overlap, so Eq. (1) is too low as soon as two of them fit
    if valid > 1:
        assert seed_rate(0.3, size, block_size) > paper_rate(0.3, size, block_size)
    else:
        assert seed_rate(0.3, size, block_size) == pytest.approx(0.3, rel=1e-12)


def test_equation_1_clamps_the_block_and_takes_tensors():
    assert paper_rate(0.3, (4, 6), 11) == pytest.approx(0.3)
    assert paper_rate(0.3, (4, 6), 5) == pytest.approx(0.3 * 24 / (4 * 5 * 2))
    on_tensors = paper_rate(torch.tensor(0.3), (14, 14), 7)
    assert float(on_tensors) == pytest.approx(paper_rate(0.3, (14, 14), 7))


def equation_8(gamma, m, n, k):
    """R-Block, Eq. (8), for blocks of 2k + 1 seeded everywhere on m x n maps, m and n > 4k + 2."""
    q = 1 - gamma
    b = 2 * k + 1
    corners = sum(q ** ((k + i) * (k + j)) for i in range(1, k + 1) for j in range(1, k + 1))
    edge = k - q ** (b * (k + 1)) * (1 - q ** (b * k)) / (1 - q**b) if k else 0.0
    return (
        (1 - 2 * k / m) * (1 - 2 * k / n) * (1 - q ** (b**2))
        + 4 * (k**2 / (m * n) - corners / (m * n))
        + 2 * (1 / m + 1 / n - 4 * k / (m * n)) * edge
    )


@pytest.mark.parametrize(("m", "n", "k"), [(7, 8, 1), (16, 16, 1), (11, 14, 2), (15, 33, 3)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_seeds_everywhere_solve_equation_8_of_rblock(m, n, k, p):
    gamma = seed_rate(p, (m, n), 2 * k + 1, seeds="all")
    assert equation_8(gamma, m, n, k) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize("seeds", ["valid", "all"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 8, 32, 300])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (14, 14), (7, 56), (60, 60), (224, 15)])
def test_the_tensor_solver_agrees_with_the_float_solver(size, block_size, seeds):
    for p in (0.0, 1e-6, 0.1, 0.499, 0.5, 0.9, 0.9999):
        on_tensors = seed_rate_tensor(torch.tensor(p, dtype=torch.float64), size, block_size, seeds)
        assert float(on_tensors) == pytest.approx(
            seed_rate(p, size, block_size, seeds), rel=1e-12, abs=0.0
        )


def test_the_tensor_solver_takes_a_scheduled_rate_without_recompiling():
    counter = CompileCounter()
    torch._dynamo.reset()
    solve = torch.compile(
        lambda p: seed_rate_tensor(p, (14, 14), 7), backend=counter, fullgraph=True
    )
    for p in (0.0, 0.1, 0.37):
        live = torch.tensor(p)
        assert float(solve(live)) == pytest.approx(seed_rate(float(live), (14, 14), 7), rel=1e-12)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, (7, 7), 3), r"drop_prob must be in \[0, 1\); got 1.0"),
        ((-0.1, (7, 7), 3), r"drop_prob must be in \[0, 1\); got -0.1"),
        ((0.1, (7, 7), 0), "block_size must be an integer of at least 1; got 0"),
        ((0.1, (7, 7), 2.5), "block_size must be an integer of at least 1; got 2.5"),
        ((0.1, (7, 0), 3), r"size must be \(H, W\) of at least 1; got \(7, 0\)"),
        ((0.1, (7, 7), 3, "some"), "seeds must be 'valid' or 'all'; got 'some'"),
    ],
)
def test_wrong_arguments_state_the_rule_and_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        seed_rate(*arguments)
