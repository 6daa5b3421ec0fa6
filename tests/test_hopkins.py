"""Spatial Hopkins, Hopkins and the adjusted Rand index against loops and scikit-learn."""

import importlib
import math

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch.nn import functional as F

from timm_structdrop.cluster import adjusted_rand_index, hopkins, spatial_hopkins

MODULE = importlib.import_module("timm_structdrop.cluster.hopkins")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def drawn(monkeypatch):
    """Everything random that the statistics draw, in order."""
    record = []
    for name in ("_random_integers", "_random"):
        original = getattr(MODULE, name)

        def recording(*args, original=original):
            record.append(original(*args))
            return record[-1]

        monkeypatch.setattr(MODULE, name, recording)
    return record


def slow_spatial_hopkins(image, rows, columns, others):
    """Eqs. (3)-(5) for one image and given points."""
    height, width = image.shape
    sum_w = sum_z = 0.0
    for y, x, other in zip(rows, columns, others, strict=True):
        assert 1 <= y <= height - 2 and 1 <= x <= width - 2
        q, r = divmod(other, width)
        around = [
            image[y + dy, x + dx].item()
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if (dy, dx) != (0, 0)
        ]
        sum_w += sum(abs(image[y, x].item() - value) for value in around) / 8
        sum_z += sum(abs(image[q, r].item() - value) for value in around) / 8
    return sum_z / (sum_z + sum_w) if sum_z + sum_w else 0.0


@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (1, 3, 3, 3), (2, 1, 9, 4)])
def test_spatial_hopkins_is_that_of_the_paper(shape, drawn):
    images = torch.randn(shape, dtype=torch.float64, generator=seeded())
    found = spatial_hopkins(images, n_points=11, generator=seeded())
    rows, columns, others = (points.tolist() for points in drawn)
    for channel in range(shape[1]):
        expected = [
            slow_spatial_hopkins(
                images[b, channel], rows[b][channel], columns[b][channel], others[b][channel]
            )
            for b in range(shape[0])
        ]
        assert found[channel].item() == pytest.approx(sum(expected) / shape[0], rel=1e-12)


def test_points_cover_what_they_should(drawn):
    spatial_hopkins(torch.rand(4, 3, 5, 7), n_points=500, generator=seeded())
    rows, columns, others = drawn
    assert rows.unique().tolist() == [1, 2, 3]
    assert columns.unique().tolist() == [1, 2, 3, 4, 5]
    assert others.unique().tolist() == list(range(35))
    for points in drawn:
        counts = torch.bincount(points.flatten()).double()
        counts = counts[counts > 0]
        mean = points.numel() / len(counts)
        assert (counts - mean).abs().max() < 5 * math.sqrt(mean)


def test_noise_is_a_half_and_structure_is_more():
    noise = torch.randn(64, 3, 16, 16, generator=seeded())
    smooth = F.avg_pool2d(F.avg_pool2d(noise, 5, 1, 2), 5, 1, 2)
    checkerboard = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    regular = checkerboard.float().expand(64, 3, 16, 16)
    assert (spatial_hopkins(noise, generator=seeded()) - 0.5).abs().max() < 0.01
    assert spatial_hopkins(smooth, generator=seeded()).min() > 0.75
    assert (spatial_hopkins(regular, generator=seeded()) - 0.5).abs().max() < 0.02


def test_constant_channels_are_zero():
    images = torch.randn(2, 3, 6, 6, generator=seeded())
    images[:, 1] = 2.5
    images[1, 2] = 0
    found = spatial_hopkins(images, generator=seeded())
    alone = spatial_hopkins(images[:1], n_points=4000, generator=seeded())
    assert found[1] == 0
    assert found[2] == pytest.approx(alone[2].item() / 2, abs=0.03)


def test_an_image_that_is_not_finite_shows():
    images = torch.randn(2, 3, 6, 6, generator=seeded())
    images[0, 1] = torch.nan
    found = spatial_hopkins(images, generator=seeded())
    assert found.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_scale_and_offset_have_no_influence(scale):
    images = torch.randint(-8, 8, (4, 3, 7, 8), generator=seeded()).float()
    expected = spatial_hopkins(images, generator=seeded(1))
    assert torch.equal(spatial_hopkins(images * scale, generator=seeded(1)), expected)
    assert torch.equal(spatial_hopkins(images + 100, generator=seeded(1)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    images = (60000 * (2 * torch.rand(4, 3, 7, 8, generator=seeded()) - 1)).to(dtype)
    found = spatial_hopkins(images, generator=seeded(1))
    assert found.dtype == torch.float32
    assert torch.equal(found, spatial_hopkins(images.float(), generator=seeded(1)))


def test_the_generator_decides():
    images = torch.randn(2, 3, 6, 6, generator=seeded())
    first = spatial_hopkins(images, generator=seeded(3))
    assert torch.equal(first, spatial_hopkins(images, generator=seeded(3)))
    assert not torch.equal(first, spatial_hopkins(images, generator=seeded(4)))
    torch.manual_seed(3)
    assert torch.equal(first, spatial_hopkins(images))
    state = torch.random.get_rng_state()
    spatial_hopkins(images, generator=seeded(3))
    hopkins(images[0, 0], generator=seeded(3))
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_sampling_error_averages_out_over_the_batch():
    image = torch.randn(1, 1, 8, 8, generator=seeded())
    errors = {}
    for batch in (1, 64):
        repeated = image.expand(batch, 200, 8, 8)
        errors[batch] = spatial_hopkins(repeated, n_points=16, generator=seeded(1)).std().item()
    assert errors[64] == pytest.approx(errors[1] / 8, rel=0.2)


@pytest.mark.parametrize(
    "images, n_points, message",
    [
        (torch.rand(2, 3, 2, 5), 4, "maps must be at least 3x3; got 2x5"),
        (torch.rand(2, 3, 5, 2), 4, "maps must be at least 3x3; got 5x2"),
        (torch.rand(2, 3, 5, 5), 0, "n_points must be at least 1; got 0"),
        (torch.rand(3, 5, 5), 4, r"A must be \(B, C, H, W\) .*; got \(3, 5, 5\)"),
        (torch.rand(0, 3, 5, 5), 4, r"at least one sample; got \(0, 3, 5, 5\)"),
    ],
)
def test_spatial_hopkins_errors(images, n_points, message):
    with pytest.raises(ValueError, match=message):
        spatial_hopkins(images, n_points=n_points)


def slow_hopkins(points, artificial, chosen):
    """Eq. (2) for one set of points, given the artificial points and those chosen."""
    points = points.tolist()
    sum_u = sum(min(math.dist(a, p) for p in points) for a in artificial)
    sum_w = sum(
        min(math.dist(points[i], p) for j, p in enumerate(points) if j != i) for i in chosen
    )
    return sum_u / (sum_u + sum_w)


@pytest.mark.parametrize("shape, n_points", [((23, 2), None), ((2, 3, 12, 4), 5), ((4, 2, 1), 2)])
def test_hopkins_is_that_of_the_paper(shape, n_points, drawn):
    data = torch.randn(shape, dtype=torch.float64, generator=seeded()) * 3 + 5
    found = hopkins(data, n_points=n_points, generator=seeded())
    assert found.shape == shape[:-2]
    n_chosen = n_points or 3
    sets = data.reshape(-1, *shape[-2:])
    uniform = drawn[0].reshape(len(sets), n_chosen, shape[-1])
    order = drawn[1].reshape(len(sets), shape[-2])
    for index, points in enumerate(sets):
        low, high = points.min(0).values, points.max(0).values
        artificial = (low + uniform[index] * (high - low)).tolist()
        ranks = order[index].tolist()
        chosen = sorted(range(shape[-2]), key=ranks.__getitem__)[:n_chosen]
        expected = slow_hopkins(points, artificial, chosen)
        assert found.reshape(-1)[index].item() == pytest.approx(expected, rel=1e-12)


def test_hopkins_of_known_sets():
    uniform = torch.rand(20, 400, 2, generator=seeded())
    centers = torch.rand(20, 4, 2, generator=seeded(1)).repeat_interleave(100, 1)
    clustered = centers + 0.005 * torch.randn(20, 400, 2, generator=seeded(2))
    side = torch.linspace(0, 1, 20)
    grid = torch.cartesian_prod(side, side)
    assert hopkins(uniform, generator=seeded()).mean().item() == pytest.approx(0.5, abs=0.03)
    assert hopkins(clustered, generator=seeded()).min() > 0.9
    assert hopkins(grid, generator=seeded()).item() < 0.35
    assert hopkins(torch.ones(5, 2)).item() == 0
    assert torch.equal(
        hopkins(uniform * 2.0**-40, generator=seeded()), hopkins(uniform, generator=seeded())
    )


def test_hopkins_keeps_small_distances_far_from_zero(monkeypatch):
    uniform = torch.rand(50, 2, dtype=torch.float64, generator=seeded())
    values = {2: uniform, 1: uniform[:, 0]}
    monkeypatch.setattr(MODULE, "_random", lambda shape, like, _: values[len(shape)].to(like))
    far = torch.randn(50, 2, generator=seeded(1)) + 2.0**14
    expected = hopkins(far.double(), n_points=50).item()
    assert hopkins(far, n_points=50).item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "points, n_points, message",
    [
        (torch.rand(10, 2), 11, r"n_points must be in \[1, n = 10\]; got 11"),
        (torch.rand(10, 2), 0, r"n_points must be in \[1, n = 10\]; got 0"),
        (torch.rand(1, 2), None, r"n >= 2 points; got \(1, 2\)"),
        (torch.rand(10), None, r"X must be \(\.\.\., n, d\) .*; got \(10,\)"),
    ],
)
def test_hopkins_errors(points, n_points, message):
    with pytest.raises(ValueError, match=message):
        hopkins(points, n_points=n_points)


@pytest.mark.parametrize("kinds", [(1, 1), (1, 5), (2, 2), (4, 7), (15, 15), (60, 60), (60, 3)])
def test_adjusted_rand_index_is_scikit_learns(kinds):
    generator = seeded()
    a = torch.randint(0, kinds[0], (6, 6, 10), generator=generator)
    b = torch.randint(0, kinds[1], (6, 6, 10), generator=generator)
    b[0] = a[0]
    b[1] = 3 - a[1]
    b[2, :3] = a[2, :3]
    a[3] = torch.arange(60).view(6, 10)
    b[4] = torch.arange(60).view(6, 10)
    b[5] = a[5] = torch.arange(60).view(6, 10)
    found = adjusted_rand_index(a, b)
    for channel in range(6):
        expected = adjusted_rand_score(a[channel].flatten(), b[channel].flatten())
        assert found[channel].item() == pytest.approx(expected, abs=1e-12)


def test_adjusted_rand_index_of_small_integers_and_single_pixels():
    a = torch.randint(0, 255, (3, 20, 20), dtype=torch.uint8, generator=seeded())
    b = torch.randint(0, 200, (3, 20, 20), generator=seeded(1))
    expected = [
        adjusted_rand_score(x.flatten(), y.flatten()) for x, y in zip(a.int(), b, strict=True)
    ]
    assert adjusted_rand_index(a, b).tolist() == pytest.approx(expected, abs=1e-12)
    assert adjusted_rand_index(a[:, :1, :1], b[:, :1, :1]).tolist() == [1, 1, 1]
    renumbered = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0]])
    assert adjusted_rand_index(renumbered, 1 - renumbered).tolist() == [1, 1]


@pytest.mark.parametrize(
    "a, b, message",
    [
        (torch.zeros(2, 3, 3).int(), torch.zeros(2, 9).int(), r"got \(2, 3, 3\) and \(2, 9\)"),
        (torch.zeros(2, 0).int(), torch.zeros(2, 0).int(), r"not empty; got \(2, 0\)"),
        (torch.zeros(9).int(), torch.zeros(9).int(), r"must be \(C, \.\.\.\).*; got \(9,\)"),
        (torch.zeros(2, 9), torch.zeros(2, 9).int(), "got torch.float32 and torch.int32"),
    ],
)
def test_adjusted_rand_index_errors(a, b, message):
    with pytest.raises(ValueError, match=message):
        adjusted_rand_index(a, b)
