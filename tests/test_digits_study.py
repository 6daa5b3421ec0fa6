"""The study's statistics against their definitions, and its protocol's promises."""

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.digits_study import protocol
from benchmarks.digits_study.cells import ABLATIONS, CONTROLS, MAIN, RATES, Cell, by_name
from benchmarks.digits_study.statistics import holm, paired_difference


def test_paired_difference_is_the_t_test():
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(1.0, 1.0, 8), generator.normal(0.0, 1.0, 8)
    # a seed that only one of them has does not count
    found = paired_difference(dict(enumerate(ours)), {**dict(enumerate(theirs)), 99: 5.0})
    expected = stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    assert found.n == 8
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_paired_difference_of_equal_figures():
    same = dict.fromkeys(range(4), 50.0)
    assert paired_difference(same, same) == (0.0, 0.0, 0.0, 1.0, 4)
    with pytest.raises(ValueError, match="at least 2 seeds in common; got 1"):
        paired_difference({0: 1.0}, {0: 1.0, 1: 2.0})


def test_holm_by_hand():
    # 0.01 * 4, 0.03 * 3 = 0.09, 0.04 * 2 = 0.08 raised to 0.09, 0.5
    assert holm([0.04, 0.01, 0.5, 0.03]) == pytest.approx([0.09, 0.04, 0.5, 0.09])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_validation_and_training_images_of_a_seed_do_not_meet_and_subsets_are_nested():
    small, validation = protocol.split(0.05, seed=3)
    large, same_validation = protocol.split(0.2, seed=3)
    assert torch.equal(validation.images, same_validation.images)
    assert torch.bincount(small.classes).tolist() == [5] * 10
    assert abs(len(large.images) - 200) <= 5
    rows = {tuple(image.flatten().tolist()) for image in large.images}
    assert {tuple(image.flatten().tolist()) for image in small.images} <= rows
    assert len(validation.images) == pytest.approx(437, abs=5)


@pytest.mark.parametrize("cell", [*MAIN, *CONTROLS, *ABLATIONS], ids=lambda cell: cell.name)
def test_cells_of_a_seed_start_from_equal_weights(cell):
    plain = protocol.build(by_name("none"), 0.0, seed=1).state_dict()
    own = protocol.build(cell, 0.1, seed=1).state_dict()
    assert all(torch.equal(own[name], value) for name, value in plain.items())
    assert cell.rate is not None or (cell.tuned_as or cell.name) in RATES


def test_voronoi_cells_are_the_nearest_centres():
    layer = protocol.build(by_name("dropcluster"), 0.1, seed=0).act1.dropcluster
    generator = torch.Generator().manual_seed(0)
    result = protocol.voronoi(layer, generator)
    assert result.labels.shape == layer.labels.shape
    for labels in result.labels:
        assert len(labels.unique()) == layer.n_clusters
        # a cell is convex: in a row or a column its pixels are neighbours
        for cell in labels.unique():
            for line in (*(labels == cell), *(labels == cell).T):
                places = line.nonzero().flatten()
                assert len(places) == 0 or int(places[-1] - places[0]) == len(places) - 1


def test_a_run_is_repeatable_and_learns(monkeypatch):
    monkeypatch.setattr(protocol, "STEPS", 60)
    monkeypatch.setattr(protocol, "FITS", (20,))
    cell = Cell("stem: voronoi cells", "lenet5_dropcluster", voronoi=True)
    rows = [protocol.run(cell, 0.2, 0.1, seed=0, test=False) for _ in range(2)]
    for row in rows:
        del row["seconds"]
    assert rows[0] == rows[1]
    assert rows[0]["val_top1"] > 60.0
