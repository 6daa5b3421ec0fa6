"""ReNA of all channels at once against loops written from the paper and against nilearn."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from timm_structdrop.cluster import NotFiniteError, _features, _graph, rena


def smooth_activations(batch, channels, height, width, seed=0):
    """Spatially correlated ReLU features without exact ties."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 3, height + 4, width + 4, generator=generator)
    kernel = torch.randn(channels, 3, 3, 3, generator=generator)
    return F.relu(F.conv2d(F.avg_pool2d(noise, 3, stride=1), kernel) + 1)


def lattice(height, width):
    """Edges of the 4-neighbour lattice between pixels numbered in raster order."""
    for y in range(height):
        for x in range(width):
            if x + 1 < width:
                yield y * width + x, y * width + x + 1
            if y + 1 < height:
                yield y * width + x, (y + 1) * width + x


def group(n, links):
    """Groups of 0 .. n - 1 joined by links, numbered by first appearance."""
    number = list(range(n))
    for a, b in links:
        old, new = number[a], number[b]
        number = [new if x == old else x for x in number]
    order = list(dict.fromkeys(number))
    return [order.index(x) for x in number]


def differing_edges(channel):
    """Lattice edges of one channel (B, H, W) between pixels that differ in some sample."""
    flat = channel.flatten(1).double().T.tolist()
    return [(a, b) for a, b in lattice(*channel.shape[1:]) if flat[a] != flat[b]]


def slow_components(channel):
    return group(channel[0].numel(), differing_edges(channel))


def slow_rena(channel, n_clusters):
    """ReNA of one channel (B, H, W), one cluster and one link at a time."""
    features = channel.flatten(1).double().T.tolist()
    edges = differing_edges(channel)
    label = list(range(len(features)))
    while len(features) > n_clusters and edges:
        length = {
            (a, b): sum((s - t) ** 2 for s, t in zip(features[a], features[b], strict=True))
            for a, b in edges
        }
        links = set()
        for cluster in range(len(features)):
            own = [edge for edge in edges if cluster in edge]
            if own:
                links.add(min(own, key=length.__getitem__))
        closest = sorted(links, key=length.__getitem__)[: len(features) - n_clusters]
        merged = group(len(features), closest)
        members = [[] for _ in range(max(merged) + 1)]
        for cluster, new in enumerate(merged):
            members[new].append(features[cluster])
        features = [[sum(v) / len(m) for v in zip(*m, strict=True)] for m in members]
        label = [merged[cluster] for cluster in label]
        edges = {tuple(sorted((merged[a], merged[b]))) for a, b in edges}
        edges = sorted((a, b) for a, b in edges if a != b)
    order = list(dict.fromkeys(label))
    return [order.index(x) for x in label]


def nilearn_rena(channel, n_clusters, rounds=1000):
    """Labels of nilearn's ReNA for one channel (B, H, W)."""
    nibabel = pytest.importorskip("nibabel")
    from nilearn.regions.rena_clustering import recursive_neighbor_agglomeration

    mask = nibabel.Nifti1Image(np.ones((*channel.shape[1:], 1), dtype=np.int8), np.eye(4))
    samples = channel.flatten(1).double().numpy()
    return recursive_neighbor_agglomeration(samples, mask, n_clusters, n_iter=rounds)


def numbered(labels):
    order = list(dict.fromkeys(labels))
    return [order.index(x) for x in labels]


def within_cluster_variance(channel, labels):
    """Sum over clusters of the squared distances to the cluster's mean."""
    flat = channel.flatten(1).double().T
    return sum(
        ((flat[labels == k] - flat[labels == k].mean(0)) ** 2).sum().item() for k in labels.unique()
    )


SHAPES = [(5, 6, 9), (1, 7, 4), (4, 1, 20), (4, 20, 1), (3, 2, 2), (8, 8, 8)]


@pytest.mark.parametrize("batch, height, width", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.9, 1.0])
def test_partition_is_that_of_the_paper(batch, height, width, share):
    n_clusters = max(2, round(share * height * width))
    generator = torch.Generator().manual_seed(1)
    activations = torch.randn(batch, 6, height, width, generator=generator)
    result = rena(activations, n_clusters)
    for channel in range(6):
        expected = slow_rena(activations[:, channel], n_clusters)
        assert result.labels[channel].flatten().tolist() == expected


def test_partition_of_correlated_features_is_that_of_the_paper():
    activations = smooth_activations(16, 8, 12, 10)
    result = rena(activations, 7)
    for channel in range(8):
        expected = slow_rena(activations[:, channel], 7)
        assert result.labels[channel].flatten().tolist() == expected
    assert result.n_found.tolist() == [7] * 8
    assert result.structured.all()


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_partition_is_nilearns_where_no_link_has_to_be_cut(rounds):
    activations = smooth_activations(12, 6, 24, 21, seed=2)
    for channel in range(6):
        one = activations[:, channel]
        n_clusters, expected = nilearn_rena(one, 2, rounds)
        assert n_clusters > 2
        found = rena(one[:, None], n_clusters).labels.flatten().tolist()
        assert found == numbered(expected.tolist())


def test_variance_within_clusters_is_no_more_than_nilearns():
    ours = theirs = 0.0
    for seed in range(4):
        activations = smooth_activations(16, 8, 14, 14, seed)
        labels = rena(activations, 15).labels.flatten(1)
        for channel in range(8):
            one = activations[:, channel]
            n_found, reference = nilearn_rena(one, 15)
            assert n_found == 15
            ours += within_cluster_variance(one, labels[channel])
            theirs += within_cluster_variance(one, torch.from_numpy(reference))
    assert ours < theirs


def patchy_activations(seed, batch, channels, height, width):
    """Few gray levels, constant patches and dead channels: many ties, many components."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(2, 5)
    values = rng.integers(0, levels, (batch, channels, height, width)).astype(np.float32)
    for channel in range(channels):
        for _ in range(rng.integers(0, 4)):
            y, x = rng.integers(0, height), rng.integers(0, width)
            values[:, channel, y:, x : x + rng.integers(1, width + 1)] = rng.integers(0, 2)
    values[:, rng.random(channels) < 0.2] = 0
    return torch.from_numpy(values)


@pytest.mark.parametrize("seed", range(40))
def test_clusters_found_are_the_larger_of_k_and_the_components(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 10, 2)
    height = max(height, 2) if width == 1 else height
    n_clusters = int(rng.integers(2, min(20, height * width) + 1))
    activations = patchy_activations(seed, rng.integers(1, 4), 6, height, width)
    result = rena(activations, n_clusters)
    for channel in range(6):
        parts = slow_components(activations[:, channel])
        labels = result.labels[channel].flatten().tolist()
        n_parts = max(parts) + 1
        assert result.n_found[channel] == max(n_clusters, n_parts)
        assert result.structured[channel] == (n_parts <= n_clusters)
        assert labels == numbered(labels)
        assert max(labels) + 1 == max(n_clusters, n_parts)
        if n_parts > n_clusters:
            assert labels == parts
        inside = [
            (a, b) for a, b in differing_edges(activations[:, channel]) if labels[a] == labels[b]
        ]
        assert group(height * width, inside) == labels, "clusters are connected"


@pytest.mark.parametrize("n_clusters, n_found", [(2, 3), (3, 3), (4, 4)])
def test_every_missing_edge_of_a_line_is_a_component(n_clusters, n_found):
    line = torch.tensor([0.0, 1, 1, 1, 2, 3]).view(1, 1, 1, 6)
    for activations in (line, line.transpose(2, 3)):
        result = rena(activations, n_clusters)
        assert result.n_found.item() == n_found
        assert result.structured.item() == (n_clusters >= 3)


def winding_graphs():
    """Edges of graphs on 60 nodes that are hard for algorithms that pass the smallest number on."""
    path = [(i, i + 1) for i in range(59)]
    comb = [(i, i + 1) for i in range(29)] + [(i, 59 - i) for i in range(30)]
    star = [(59, i) for i in range(59)]
    pairs = [(i, 59 - i) for i in range(0, 30, 2)]
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    zigzag = [i // 2 if i % 2 else 59 - i // 2 for i in range(60)]
    for edges in (path, comb, star, pairs, path[:20] + path[25:50]):
        for number in (range(60), shuffled, zigzag):
            yield [(number[a], number[b]) for a, b in edges]


@pytest.mark.parametrize("edges", list(winding_graphs()))
def test_components_of_winding_graphs(edges):
    u, v = torch.tensor(edges).T
    found = _graph.components(60, u, v, longest=60).tolist()
    assert numbered(found) == group(60, edges)
    assert all(found.index(root) == root for root in found), "the smallest node stands for all"


def test_a_chain_as_long_as_the_map_merges_in_one_round():
    ramp = torch.cumsum(0.9 ** torch.arange(64.0), 0).view(1, 1, 1, 64)
    result = rena(ramp, 2, max_rounds=1)
    assert result.labels.flatten().tolist() == [0] + [1] * 63


@pytest.mark.parametrize("scale", [1e-5, 1e5, 1e-30, 1e30])
def test_scale_has_no_influence(scale):
    activations = smooth_activations(16, 8, 12, 12)
    assert torch.equal(rena(activations, 10).labels, rena(scale * activations, 10).labels)


@pytest.mark.parametrize("exponent", [-100, -20, 20, 100])
def test_scale_has_no_influence_on_ties(exponent):
    activations = patchy_activations(5, 3, 12, 9, 8)
    scaled = activations * 2.0**exponent
    assert torch.equal(rena(activations, 12).labels, rena(scaled, 12).labels)


def test_each_channel_has_its_own_scale():
    activations = smooth_activations(8, 5, 10, 10)
    scales = torch.tensor([1e-30, 1e-4, 1.0, 1e6, 1e30]).view(1, 5, 1, 1)
    assert torch.equal(rena(activations, 10).labels, rena(activations * scales, 10).labels)


def test_the_largest_and_the_smallest_numbers():
    activations = smooth_activations(4, 2, 6, 6)
    activations /= activations.max()
    expected = rena(activations, 5).labels
    assert torch.equal(rena(activations * 2 - 1, 5).labels, expected)
    huge = (activations * 2 - 1) * torch.finfo(torch.float32).max
    assert torch.equal(rena(huge, 5).labels, expected)


def test_a_minute_difference_is_an_edge():
    one = torch.zeros(1, 1, 1, 4)
    one[..., 0] = 1
    assert rena(one, 2).n_found.item() == 3
    one[..., 2:] = torch.tensor([2.0**-110, 2.0**-109])
    assert rena(one, 2).n_found.item() == 2
    assert rena(one.double() * 2.0**-500, 2).n_found.item() == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    activations = (1000 * smooth_activations(64, 4, 10, 9)).to(dtype)
    expected = rena(activations.float(), 8)
    found = rena(activations, 8)
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.structured, expected.structured)


def test_float64_sees_differences_float32_does_not():
    activations = 1 + 1e-9 * torch.randn(4, 2, 5, 5, dtype=torch.float64)
    assert rena(activations, 4).structured.all()
    assert not rena(activations.float(), 4).structured.any()


def test_memory_format_and_gradients_have_no_influence():
    activations = smooth_activations(8, 6, 9, 11)
    expected = rena(activations, 9).labels
    channels_last = activations.to(memory_format=torch.channels_last).requires_grad_()
    assert torch.equal(rena(channels_last, 9).labels, expected)
    part = torch.cat([activations, activations])[::2][:, ::2]
    assert torch.equal(rena(part, 9).labels, rena(part.contiguous(), 9).labels)


def test_the_input_stays_as_it_was():
    for batch in (1, 3):
        activations = smooth_activations(batch, 2, 5, 5)
        copy = activations.clone()
        rena(activations, 4)
        assert torch.equal(activations, copy)


def test_same_input_same_result():
    activations = torch.cat(
        [smooth_activations(8, 6, 12, 12), patchy_activations(3, 8, 6, 12, 12)], dim=1
    )
    first, second = rena(activations, 10), rena(activations.clone(), 10)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.n_found, second.n_found)


def test_channels_do_not_influence_each_other():
    activations = torch.cat(
        [smooth_activations(8, 6, 12, 11), patchy_activations(3, 8, 6, 12, 11)], dim=1
    )
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    all_of_them = rena(activations, 10)
    permuted = rena(activations[:, order], 10)
    assert torch.equal(permuted.labels, all_of_them.labels[order])
    assert torch.equal(permuted.structured, all_of_them.structured[order])
    for channel in range(12):
        alone = rena(activations[:, channel : channel + 1], 10)
        assert torch.equal(alone.labels[0], all_of_them.labels[channel])


@pytest.mark.parametrize("block", [1, 64, 1000])
def test_blocks_have_no_influence(block, monkeypatch):
    activations = torch.cat(
        [patchy_activations(1, 8, 7, 9, 10), smooth_activations(8, 4, 9, 10)], dim=1
    )
    activations[:, [0, 6, 10]] = 0
    expected = rena(activations, 8)
    monkeypatch.setattr(_features, "_CPU_BLOCK", block)
    assert torch.equal(rena(activations, 8).labels, expected.labels)
    reverse = rena(activations.flip(1), 8)
    assert torch.equal(reverse.labels, expected.labels.flip(0))


def test_repeated_edges_have_no_influence(monkeypatch):
    activations = torch.cat(
        [patchy_activations(2, 4, 8, 14, 14), smooth_activations(4, 4, 14, 14)], dim=1
    )
    expected = rena(activations, 5)
    calls = []

    def without_loops(u, v, n_nodes):
        calls.append(n_nodes)
        return u != v

    monkeypatch.setattr(_graph, "distinct", without_loops)
    assert torch.equal(rena(activations, 5).labels, expected.labels)
    assert calls


def test_dead_and_constant_channels():
    activations = smooth_activations(4, 4, 6, 5)
    activations[:, 1] = 0
    activations[:, 2] = -3.5
    activations[:, 3] = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
    result = rena(activations, 6)
    assert result.n_found.tolist() == [6, 30, 30, 30]
    assert result.structured.tolist() == [True, False, False, False]
    assert result.labels[1:].flatten(1).tolist() == [list(range(30))] * 3
    nothing_alive = rena(torch.zeros(2, 3, 4, 4), 15)
    assert nothing_alive.n_found.tolist() == [16] * 3
    assert not nothing_alive.structured.any()


def test_as_many_clusters_as_pixels():
    activations = smooth_activations(2, 3, 4, 5)
    activations[:, 1] = 0
    result = rena(activations, 20)
    assert result.labels.flatten(1).tolist() == [list(range(20))] * 3
    assert result.structured.all()


def test_rounds_can_run_out():
    activations = smooth_activations(8, 3, 16, 16)
    result = rena(activations, 4, max_rounds=1)
    assert (result.n_found > 4).all()
    assert (result.n_found <= 128).all()
    assert not result.structured.any()


def test_kinds_of_the_result():
    result = rena(smooth_activations(2, 3, 6, 7), 4)
    assert result.labels.shape == (3, 6, 7)
    assert result.n_found.shape == result.structured.shape == (3,)
    assert result.labels.dtype == result.n_found.dtype == torch.int64
    assert result.structured.dtype == torch.bool
    with pytest.raises(AttributeError):
        result.labels = None


class CountOperations(TorchDispatchMode):
    """Counts the operations that PyTorch runs."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_no_loop_over_channels():
    one = smooth_activations(4, 1, 8, 8)
    counts = []
    for channels in (2, 3, 128):
        with CountOperations() as counter:
            rena(one.repeat(1, channels, 1, 1), 5)
        counts.append(counter.count)
    assert counts[0] == counts[1] == counts[2] < 1000


@pytest.mark.parametrize(
    "activations, n_clusters, message",
    [
        (torch.rand(2, 3, 8, 8), 100, r"n_clusters must be in \[2, H\*W = 64\]; got 100"),
        (torch.rand(2, 3, 8, 8), 1, r"n_clusters must be in \[2, H\*W = 64\]; got 1"),
        (torch.rand(2, 3, 1, 1), 2, r"n_clusters must be in \[2, H\*W = 1\]; got 2"),
        (torch.rand(3, 8, 8), 4, r"must be \(B, C, H, W\); got 3 dimensions: \(3, 8, 8\)"),
        (torch.rand(0, 3, 8, 8), 4, r"at least one sample and one channel; got \(0, 3, 8, 8\)"),
        (torch.rand(3, 0, 8, 8), 4, r"at least one sample and one channel; got \(3, 0, 8, 8\)"),
        (torch.ones(2, 3, 8, 8).int(), 4, r"must be floating point; got torch.int32"),
    ],
)
def test_errors_state_the_rule_and_the_value(activations, n_clusters, message):
    with pytest.raises(ValueError, match=message):
        rena(activations, n_clusters)
    with pytest.raises(ValueError, match="max_rounds must be at least 1; got 0"):
        rena(torch.rand(2, 3, 8, 8), 4, max_rounds=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_that_are_not_finite(value, dtype):
    activations = torch.rand(2, 9, 4, 4).to(dtype)
    activations[1, [3, 7], 2, 2] = value
    with pytest.raises(NotFiniteError, match=r"got NaN or Inf in 2 of 9 channels: 3, 7$"):
        rena(activations, 4)
    activations[0, :6, 1, 1] = value
    with pytest.raises(NotFiniteError, match=r"in 7 of 9 channels: 0, 1, 2, 3, 4, \.\.\.$"):
        rena(activations, 4)


def test_unstructured_channels_are_known_before_the_first_round():
    activations = smooth_activations(16, 32, 16, 16)
    activations[:, ::2] = 0
    activations[:, 1, :8] = 0
    expected = slow_components(activations[:, 1])
    with CountOperations() as counter:
        result = rena(activations, 15, max_rounds=1)
    assert result.n_found[:3].tolist() == [256, max(expected) + 1, 256]
    assert result.labels[1].flatten().tolist() == expected
    assert counter.count < 500
