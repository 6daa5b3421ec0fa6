"""The numbers of the analysis against slow recomputation, and pictures that can be read."""

import copy
import json
import sys

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from timm_structdrop import attach
from timm_structdrop.analysis import (
    ClusterMaps,
    HopkinsReport,
    LayerHopkins,
    cluster_layers,
    cluster_maps,
    cluster_study,
    collect_maps,
    draw_cluster_maps,
    draw_hopkins_histograms,
    draw_hopkins_map,
    draw_training_mask,
    find_places,
    fit_clusters,
    hopkins_report,
    training_mask,
)
from timm_structdrop.analysis.cluster_study import (
    CELLS,
    matched_squares,
    square_cells,
    voronoi_cells,
    within_correlation,
)
from timm_structdrop.analysis.clusters import colour_labels
from timm_structdrop.analysis.maps import Place, watch_maps
from timm_structdrop.cluster import rena, spatial_hopkins
from timm_structdrop.errors import UserError


def smooth_images(n: int, channels: int = 3, size: tuple[int, int] = (32, 32)) -> Tensor:
    noise = torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(3))
    return nn.functional.avg_pool2d(noise, 5, stride=1, padding=2) * 4


def lenet(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("lenet5_dropcluster", n_clusters=5, **kwargs).eval()


def kill_channel(model: nn.Module, channel: int) -> None:
    with torch.no_grad():
        model.conv1.weight[channel] = 0
        model.conv1.bias[channel] = -1


@pytest.mark.parametrize("name", ["resnet18", "resnet18_dropcluster", "resnet18_dropblock"])
def test_candidates_are_the_stem_and_every_stage(name):
    model = timm.create_model(name)
    stages = [place.name for place in find_places(model, (64, 64))]
    assert stages == ["act1", "layer1", "layer2", "layer3", "layer4"]
    convs = [place.name for place in find_places(model, (64, 64), "convs")]
    assert len(convs) == len(set(convs)) == 1 + 16
    assert all(name in convs for name in ("act1", "layer1.0.act1", "layer4.1.act1"))
    with pytest.raises(UserError, match="layers must be one of stages, convs; got 'all'"):
        find_places(model, (64, 64), "all")


def test_the_place_of_a_layer_elsewhere_is_a_candidate():
    model = attach(timm.create_model("resnet18"), "dropcluster", modules=["layer1.0.act1"])
    names = [place.name for place in find_places(model, (64, 64))]
    assert names.count("layer1.0.act1") == 1 and len(names) == 6
    assert list(cluster_layers(model)) == ["layer1.0.act1"]


def test_statistics_are_those_of_the_maps_before_the_layer():
    model, images = lenet(), smooth_images(8, 1)
    kill_channel(model, 2)
    fit_clusters(model, images)
    assert cluster_layers(model)["act1"].structured.tolist() == [True] * 2 + [False] + [True] * 3
    report = hopkins_report(model, images, seed=4)
    stem = torch.relu(model.conv1(images))
    expected = spatial_hopkins(stem, 64, torch.Generator().manual_seed(4))
    torch.testing.assert_close(report.layers[0].per_channel, expected)
    assert report.layers[0].per_channel[2] == 0
    model.act1.dropcluster.structured[0] = False  # seen by the layers after it only
    changed = hopkins_report(model, images, seed=4)
    assert torch.equal(changed.layers[0].per_channel, report.layers[0].per_channel)
    assert not torch.equal(changed.layers[1].per_channel, report.layers[1].per_channel)


def test_statistics_do_not_depend_on_batches_and_other_candidates():
    torch.manual_seed(0)
    model, images = timm.create_model("resnet20").eval(), smooth_images(7)
    attach(model, "dropcluster", modules=["layer2.0.act1"], img_size=32)
    whole = hopkins_report(model, images, n_points=2000)
    parts = hopkins_report(model, images, n_points=2000, batch_size=3)
    for a, b in zip(whole.layers, parts.layers, strict=True):
        assert a.name == b.name
        torch.testing.assert_close(a.per_channel, b.per_channel, atol=0.04, rtol=0)
    convs = {
        found.name: found
        for found in hopkins_report(model, images, layers="convs", n_points=2000).layers
    }
    for common in [found for found in whole.layers if found.name in convs]:
        assert torch.equal(common.per_channel, convs[common.name].per_channel)
    assert [found.name for found in whole.layers] == [
        "act1",
        "layer1",
        "layer2.0.act1",
        "layer2",
        "layer3",
    ]


def test_a_module_that_runs_twice_is_seen_the_first_time():
    act = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), act, nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), act)
    seen = []
    watch_maps(
        model,
        [Place("1", "stem", act, False)],
        smooth_images(5),
        lambda _, shown: seen.append(tuple(shown.shape)),
        batch_size=3,
    )
    assert seen == [(3, 4, 30, 30), (2, 4, 30, 30)]


def test_watching_leaves_the_model_as_it_was():
    model, images = timm.create_model("resnet20"), smooth_images(3)
    model.train()
    model.layer2.eval()
    flags = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    hopkins_report(model, images)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_maps_are_copies_of_what_the_module_returned():
    model, images = timm.create_model("resnet20").eval(), smooth_images(3)
    place = next(p for p in find_places(model, (32, 32), "convs") if p.name.endswith("bn2"))
    nn.init.normal_(model.get_submodule(place.name).weight)
    kept = []
    model.get_submodule(place.name).register_forward_hook(lambda *a: kept.append(a[2].clone()))
    assert torch.equal(collect_maps(model, place, images), kept[0])  # += comes after it


def layer(name: str, values: list[float], size: tuple[int, int] = (8, 8)) -> LayerHopkins:
    return LayerHopkins(name, "stage", size, torch.tensor(values))


def test_the_deepest_structured_layer_is_recommended():
    layers = [
        layer("a", [0.91, 0.91, 0.11]),
        layer("b", [0.5, 0.6875, 0.91, 0.5625]),  # median 0.625, the mean of the middle two
        layer("c", [0.62, 0.62, 1.0]),
        layer("d", [0.91, 0.91], size=(3, 4)),  # 12 pixels for 15 clusters
    ]
    report = HopkinsReport(layers, 4, 64, 0.625, 15)
    assert report.layers[1].median == 0.625
    assert report.recommended is layers[1]
    assert HopkinsReport(layers, 4, 64, 0.7, 15).recommended is layers[0]
    assert HopkinsReport(layers, 4, 64, 0.7, 12).recommended is layers[3]
    assert HopkinsReport(layers[:3], 4, 64, 0.95, 15).recommended is None
    numbers = json.loads(json.dumps(report.numbers()))
    assert numbers["recommended"] == "b"
    assert [entry["structured"] for entry in numbers["layers"]] == [True, True, False, True]
    edges = np.asarray(numbers["histogram_edges"])
    for entry in numbers["layers"]:
        counts, _ = np.histogram(entry["per_channel"], edges)
        assert entry["histogram"] == counts.tolist() and sum(counts) == entry["channels"]
    assert sum(1 for _ in report.rows()) == 12


def test_small_maps_are_skipped_and_bad_input_is_refused():
    model = lenet()
    assert hopkins_report(model, smooth_images(2, 1)).skipped == {"layer2": (1, 1)}
    tiny = timm.create_model("resnet18").eval()
    with pytest.raises(UserError, match=r"maps must be at least 3x3 .* act1 2x2"):
        hopkins_report(tiny, smooth_images(2, size=(4, 4)))
    with pytest.raises(UserError, match="must run on 2x2 images"):
        hopkins_report(timm.create_model("lenet5"), smooth_images(2, 1, (2, 2)))
    with pytest.raises(UserError, match="activations must be finite; act1 holds"):
        hopkins_report(model, torch.full((1, 1, 32, 32), torch.nan))
    with pytest.raises(UserError, match=r"threshold must be in \[0, 1\]; got 2"):
        hopkins_report(model, smooth_images(2, 1), threshold=2)
    with pytest.raises(UserError, match="needs a CNN"):
        mlp = nn.Sequential(nn.Linear(4, 4))
        mlp.feature_info = [{"module": "0", "reduction": 4}]
        hopkins_report(mlp, smooth_images(2))
    with pytest.raises(UserError, match=r"\(B, H, W, C\)"):
        find_places(timm.create_model("swin_tiny_patch4_window7_224"), (224, 224))


def test_fit_uses_training_activations_and_changes_only_clusters():
    torch.manual_seed(0)
    model = timm.create_model("resnet20_dropcluster", n_clusters=6, fit_start_step=5)
    model.bn1.running_mean.normal_()
    images = smooth_images(12)
    twin = copy.deepcopy(model).train()
    expected = rena(stem(twin, images), 6)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    facts = fit_clusters(model, images, at=3)
    fitted = model.act1.dropcluster
    assert torch.equal(fitted.labels.long(), expected.labels)
    assert int(fitted.fitted_at) == 3 and int(fitted.step) == 0
    assert facts["act1"]["n_clusters"] == 6 and facts["act1"]["channels"] == 16
    assert not any(module.training for module in model.modules())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {key.rpartition(".")[2] for key in changed} <= {"labels", "fitted_at", "fitted_size"}
    assert stem(model, images).std() != stem(twin, images).std()


def stem(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.relu(model.bn1(model.conv1(images)))


def test_every_layer_is_fitted_or_it_is_an_error():
    model, images = timm.create_model("resnet18"), smooth_images(6, size=(64, 64))
    with pytest.raises(UserError, match="must have a DropCluster layer; ResNet has none"):
        fit_clusters(model, images)
    attach(model, "dropcluster", modules=["act1", "layer1"], n_clusters=7, img_size=64)
    assert list(fit_clusters(model, images)) == ["act1", "layer1"]
    assert all(layer.is_fitted for layer in cluster_layers(model).values())
    broken = lenet()
    for channel in range(6):
        kill_channel(broken, channel)
    with pytest.raises(UserError, match=r"act1 must have .* none of the 6 channels has structure"):
        fit_clusters(broken, smooth_images(4, 1))
    with pytest.raises(UserError, match="NaN or Inf"):
        fit_clusters(lenet(), torch.full((2, 1, 32, 32), torch.nan))
    with pytest.raises(UserError, match=r"n_clusters must be in \[2, H\*W = 4\]"):
        fit_clusters(lenet(), smooth_images(2, 1, (6, 6)))


def test_numbers_of_the_clusters():
    model, images = lenet(), smooth_images(9, 1)
    kill_channel(model, 4)
    with pytest.raises(UserError, match="the layer at act1 is not fitted"):
        cluster_maps(model, images)
    fit_clusters(model, images)
    (maps,) = cluster_maps(model, images, n_samples=3)
    for channel in range(6):
        counts = [int((maps.labels[channel] == k).sum()) for k in range(5)]
        assert maps.sizes()[channel].tolist() == (counts if channel != 4 else [0] * 5)
    numbers = json.loads(json.dumps(maps.numbers()))
    assert numbers["unstructured_channels"] == [4]
    assert numbers["mean_cluster_pixels"] == pytest.approx(28 * 28 / 5)
    rows = list(maps.rows())
    assert [row["structured"] for row in rows] == [1, 1, 1, 1, 0, 1]
    assert sum(map(int, rows[0]["pixels_of_clusters"].split())) == 28 * 28
    lines = [row["labels"].split() for row in maps.label_rows() if row["channel"] == 1]
    assert torch.equal(torch.tensor([[int(v) for v in line] for line in lines]), maps.labels[1])
    assert maps.features.shape == (3, 6, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(maps.features, torch.relu(model.conv1(images[:3])))


def test_the_mask_drops_whole_clusters():
    model, images = lenet(drop_block_rate=0.4), smooth_images(9, 1)
    kill_channel(model, 4)
    fit_clusters(model, images)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    mask = training_mask(model, "act1", seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(training_mask(model, "act1", seed=7).kept, mask.kept)
    assert not torch.equal(training_mask(model, "act1", seed=8).kept, mask.kept)
    labels = model.act1.dropcluster.labels
    for channel in range(6):
        for y in range(28):
            for x in range(28):
                gone = channel == 4 or int(labels[channel, y, x]) in mask.dropped[channel]
                assert bool(mask.kept[channel, y, x]) != gone
    assert [len(dropped) for dropped in mask.dropped] == [2, 2, 2, 2, 0, 2]
    ones = int(mask.kept.sum())
    assert mask.scale == pytest.approx(6 * 28 * 28 / ones)
    assert mask.numbers()["kept_fraction"] == pytest.approx(ones / (6 * 28 * 28))
    with pytest.raises(UserError, match="there is none at layer1"):
        training_mask(model, "layer1")


def correlation_by_loops(maps: Tensor, cells: Tensor) -> tuple[list[float], list[int]]:
    """The oracle: every pair of pixels of every cell, one at a time."""
    means, counts = [], []
    for cell in cells:
        found = []
        pixels = [p for p in range(len(cell)) if cell[p] and maps[:, p].std() > 0]
        for i, p in enumerate(pixels):
            for q in pixels[i + 1 :]:
                found.append(np.corrcoef(maps[:, p].numpy(), maps[:, q].numpy())[0, 1])
        means.append(np.mean(found) if found else np.nan)
        counts.append(len(found))
    return means, counts


def test_correlations_against_loops_over_pairs():
    torch.manual_seed(0)
    maps = (torch.randn(11, 30) @ torch.randn(30, 30) * 3 + 100).double()
    maps[:, 4] = 7.0
    cells = torch.rand(6, 30) < 0.3
    cells[1] = False
    cells[2] = torch.arange(30) == 9
    cells[3] = torch.isin(torch.arange(30), torch.tensor([4, 8]))  # one of the two is constant
    mean, pairs = within_correlation(maps, cells)
    expected, counts = correlation_by_loops(maps, cells)
    assert pairs.tolist() == counts and counts[1:4] == [0, 0, 0]
    np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-9)
    with pytest.raises(UserError, match=r"N >= 2"):
        within_correlation(maps[:1], cells)
    with pytest.raises(UserError, match=r"got \(11, 30\) and \(6, 29\)"):
        within_correlation(maps, cells[:, 1:])


@pytest.mark.parametrize("size", [(28, 28), (10, 30), (7, 5), (1, 12), (3, 3)])
@pytest.mark.parametrize("n", [2, 4, 15])
def test_cells_that_know_nothing_of_the_data(size, n):
    height, width = size
    n = min(n, height * width)
    squares = square_cells(size, n)
    count = int(squares.max()) + 1
    assert squares.unique().tolist() == list(range(count)) and count <= 2 * n
    sizes = squares.flatten().bincount()
    assert sizes.min() > 0 and n / 2 <= count
    cells = voronoi_cells(size, n, torch.Generator().manual_seed(n))
    assert cells.shape == size and len(cells.unique()) == n
    members = cells.unique()[:, None, None] == cells
    matched = matched_squares(members)
    assert torch.equal(matched.sum((1, 2)), members.sum((1, 2)))


def test_squares_have_the_clusters_centres_and_fit_into_the_map():
    assert torch.equal(
        square_cells((4, 6), 6),
        torch.arange(6).view(2, 3).repeat_interleave(2, 0).repeat_interleave(2, 1),
    )
    ell = torch.zeros(4, 9, 9, dtype=torch.bool)
    ell[0, 2:8, 4] = ell[0, 7, 4:7] = ell[0, 2, 3] = True  # 9 pixels around (5, 4.33)
    ell[1, 0, :4] = True  # along the edge
    ell[2] = True
    ell[3, :, 8] = True
    squares = matched_squares(ell)
    expected = torch.zeros_like(ell)
    expected[0, 4:7, 3:6] = True
    expected[1, 0:2, 1:3] = True
    expected[2] = True
    expected[3, 3:6, 6:9] = True
    assert torch.equal(squares, expected)


def blobs(n: int, labels: Tensor, noise: float) -> Tensor:
    """Activations in which the pixels of a cluster share a signal."""
    signal = torch.randn(n, *labels.shape[:1], int(labels.max()) + 1)
    shared = signal.gather(2, labels.flatten(1).expand(n, -1, -1)).view(n, *labels.shape)
    return shared + noise * torch.randn(n, *labels.shape)


def test_a_study_tells_clusters_of_the_data_from_others():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(5)
    labels = torch.stack([voronoi_cells((12, 16), 6, generator) for _ in range(4)])
    structured = torch.tensor([True, True, False, True])
    data = blobs(200, labels, 0.5)
    study = cluster_study("stem", data, labels, structured, 6, n_random=3)
    assert study.channels == [0, 1, 3]
    own = study.correlations["clusters"]
    assert own.mean() == pytest.approx(1 / 1.25, abs=0.03)
    for key in CELLS:
        if key != "clusters":
            assert bool((own > study.correlations[key] + 0.1).all()), key
    for row, channel in enumerate(study.channels):
        cells = labels[channel].unique()[:, None] == labels[channel].flatten()
        means, pairs = correlation_by_loops(data[:, channel].flatten(1), cells)
        assert own[row, 0] == pytest.approx(np.mean(means), abs=1e-5)
        assert own[row, 1] == pytest.approx(np.average(means, weights=pairs), abs=1e-5)
    numbers = json.loads(json.dumps(study.numbers()))
    figure = numbers["cells"]["turned"]["over_pairs"]
    assert figure["clusters_are_higher_in_channels"] == 3
    assert figure["mean"] + figure["clusters_are_higher_by"] == pytest.approx(
        numbers["cells"]["clusters"]["over_pairs"]["mean"]
    )
    assert len(list(study.rows())) == 3
    nothing = cluster_study("stem", torch.randn(400, 4, 12, 16), labels, structured, 6, n_random=2)
    assert all(values.abs().max() < 0.03 for values in nothing.correlations.values())
    with pytest.raises(UserError, match="needs a channel that varies; stem has none"):
        cluster_study("stem", torch.zeros(3, 4, 12, 16), labels, structured, 6)
    with pytest.raises(UserError, match=r"got \(3, 4, 12, 15\)"):
        cluster_study("stem", torch.zeros(3, 4, 12, 15), labels, structured, 6)


@pytest.mark.parametrize("n", [2, 15, 40, 600])
def test_clusters_that_touch_have_different_colours(n):
    labels = voronoi_cells((30, 20), n, torch.Generator().manual_seed(n)).numpy()
    picture = colour_labels(labels)
    assert picture.shape == (30, 20, 3) and picture.min() >= 0 and picture.max() <= 1
    for y in range(30):
        for x in range(20):
            assert np.array_equal(picture[y, x], picture[np.nonzero(labels == labels[y, x])][0])
            for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
                v, u = y + dy, x + dx
                if v < 30 and 0 <= u < 20 and labels[v, u] != labels[y, x]:
                    assert not np.array_equal(picture[y, x], picture[v, u])
    if n <= 20:
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) == n


def overlaps(figure) -> list[tuple[str, str]]:
    """Pairs of texts of a figure whose boxes overlap by more than a pixel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    drawn = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    drawn += [figure._suptitle] if figure._suptitle else []
    for axis in figure.axes:
        drawn += axis.texts
        if axis.axison:
            drawn += [axis.title, axis.xaxis.label, axis.yaxis.label]
            for one in (axis.xaxis, axis.yaxis):
                low, high = sorted(one.get_view_interval())
                ticks = one.get_major_ticks()
                drawn += [
                    t
                    for tick in ticks
                    if low <= tick.get_loc() <= high
                    for t in (tick.label1, tick.label2)
                ]
    drawn = {id(t): t for t in drawn if t.get_visible() and t.get_text().strip()}.values()
    boxes = [(t.get_text(), t.get_window_extent().padded(-1)) for t in drawn]
    inside = figure.bbox
    for text, box in boxes:
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1, f"{text!r} leaves the picture"
        assert inside.y0 <= box.y0 and box.y1 <= inside.y1, f"{text!r} leaves the picture"
    return [
        (a[0], b[0]) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a[1].overlaps(b[1])
    ]


@pytest.mark.parametrize("channels", [1, 6, 64])
@pytest.mark.parametrize("size", [(6, 6), (4, 12)])
def test_texts_of_the_pictures_do_not_overlap(channels, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.Identity())
    attach(model, "dropcluster", modules=["0"], n_clusters=3, img_size=size)
    images = torch.randn(5, 3, *size)
    fit_clusters(model, images)
    layer = model[0].dropcluster
    layer.structured[channels // 2] = channels == 1
    (maps,) = cluster_maps(model, images)
    mask = training_mask(model, maps.name)
    assert overlaps(draw_cluster_maps(maps, "a_rather_long_model_name_dropcluster")) == []
    assert overlaps(draw_training_mask(maps, mask, "a_rather_long_model_name_dropcluster")) == []
    values = LayerHopkins("layer1.0.act1", "conv", size, torch.rand(channels))
    assert overlaps(draw_hopkins_map(values, "a_rather_long_model_name_dropcluster", 64)) == []


@pytest.mark.parametrize(("channels", "inches"), [(16, 1.0), (32, 1.0), (64, 0.7)])
def test_clusters_of_few_channels_are_drawn_large(channels, inches):
    labels = torch.arange(36).reshape(1, 6, 6).expand(channels, 6, 6)
    structured = torch.ones(channels, dtype=torch.bool)
    images, features = torch.rand(2, 1, 6, 6), torch.rand(2, channels, 6, 6)
    maps = ClusterMaps("act1", labels, structured, 36, 0.1, 0, images, features)
    figure = draw_cluster_maps(maps, "m")
    tiles = figure.axes[0]
    width = tiles.get_position().width * figure.get_figwidth()
    assert width / (tiles.get_xlim()[1] - tiles.get_xlim()[0]) >= inches


@pytest.mark.parametrize("n", [1, 2, 5, 13, 30])
def test_texts_of_the_histograms_do_not_overlap(n):
    layers = [layer(f"stages.{i}.blocks.10.conv", torch.rand(512).tolist()) for i in range(n)]
    report = HopkinsReport(layers, 64, 64, 0.4, 15)
    assert overlaps(draw_hopkins_histograms(report, "some_model_with_a_long_name.tag_in1k")) == []


def test_pictures_without_matplotlib_name_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = HopkinsReport([layer("a", [0.9, 0.1])], 4, 64, 0.6, 15)
    with pytest.raises(UserError, match=r'pip install "timm-structdrop\[plot\]"'):
        draw_hopkins_histograms(report, "m")


def test_places_of_layers_in_empty_slots():
    model = attach(timm.create_model("resnet18").eval(), "dropblock", where="last_conv", stages=[1])
    images = smooth_images(3, size=(64, 64))
    places = find_places(model, (64, 64), "convs")
    names = [place.name for place in places]
    assert len(names) == len(set(names)) == 17
    assert names[:3] == ["act1", "layer1.0.act1", "layer1.0.drop_path"]
    assert "layer2.0.bn2" in names
    assert collect_maps(model, places[2], images).shape == (3, 64, 16, 16)
