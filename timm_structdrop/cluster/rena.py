"""ReNA, recursive nearest agglomeration (Hoyos-Idrobo et al., 2018), of all channels at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from timm_structdrop.cluster import _features, _graph


@dataclass(frozen=True, eq=False)
class ReNAResult:
    """Clusters of every channel.

    Attributes:
        labels: (C, H, W) int64, 0 .. n_found[c] - 1 in raster order of first appearance.
        n_found: (C,) int64, the number of clusters of each channel.
        structured: (C,) bool, True where no more clusters than requested were found.
    """

    labels: Tensor
    n_found: Tensor
    structured: Tensor


@torch.no_grad()
def rena(activations: Tensor, n_clusters: int, max_rounds: int = 1000) -> ReNAResult:
    """Cluster the pixels of each channel by how they vary over the batch (DropCluster, Alg. 1).

    In every round each cluster links to its nearest neighbour on the 4-neighbour lattice, linked
    clusters merge, and their features are averaged, each former cluster counting once. The last
    round keeps only the shortest links, as many as leave exactly `n_clusters` clusters. Distances
    are squared Euclidean over the batch, and two pixels that never differ share no edge. With P
    the number of components of that lattice, a channel ends with max(n_clusters, P) clusters;
    where P > n_clusters the channel is unstructured and its clusters are those components.

    The scale of a channel has no influence: it is normalised by a power of two, and distances
    are computed in float32 (in float64 for float64 activations) and compared as float32. Those
    that are equal then are told apart by the position of the edge, so the result is deterministic,
    on CUDA too.

    Args:
        activations: (B, C, H, W), of any floating dtype and memory format.
        n_clusters: Clusters per channel, in [2, H * W].
        max_rounds: A channel with more than `n_clusters` clusters after so many rounds counts as
            unstructured. Each round at least halves the clusters that have an edge.

    Raises:
        ValueError: If an argument is out of range or the activations are not floating point of
            shape (B, C, H, W) with B, C >= 1.
        NotFiniteError: A ValueError, if a channel has a NaN or an infinite value.
    """
    _check(activations, n_clusters, max_rounds)
    pixels = _features.PixelFeatures(activations)
    right, down = pixels.lattice_distances()
    component, structured = _components(right, down, n_clusters)
    takes_part = structured[:, None, None]
    right, down = right * takes_part, down * takes_part
    cluster = _agglomerate(pixels, right, down, structured, n_clusters, max_rounds)
    first = _graph.first_members(cluster).view_as(component)
    first = torch.where(structured[:, None], first, component)
    height, width = activations.shape[2:]
    return _number(first, height, width, n_clusters)


def _check(activations: Tensor, n_clusters: int, max_rounds: int) -> None:
    shape = tuple(activations.shape)
    if len(shape) != 4:
        raise ValueError(f"activations must be (B, C, H, W); got {len(shape)} dimensions: {shape}")
    if 0 in shape[:2]:
        raise ValueError(f"activations must have at least one sample and one channel; got {shape}")
    if not activations.is_floating_point():
        raise ValueError(f"activations must be floating point; got {activations.dtype}")
    pixels = shape[2] * shape[3]
    if not 2 <= n_clusters <= pixels:
        raise ValueError(f"n_clusters must be in [2, H*W = {pixels}]; got {n_clusters}")
    if max_rounds < 1:
        raise ValueError(f"max_rounds must be at least 1; got {max_rounds}")


def _components(right: Tensor, down: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Components of the lattice of the pixels that differ.

    Args:
        right: (C, H, W - 1) squared distances of neighbours in a row.
        down: (C, H - 1, W) the same in a column.
        n_clusters: Clusters per channel.

    Returns:
        first (C, H*W) int64, for each pixel of an unstructured channel the first pixel of its
        component (elsewhere without meaning); structured (C,) bool, no more than n_clusters
        components.
    """
    channels, height, width = right.shape[0], right.shape[1], down.shape[2]
    pixels = height * width
    first = torch.arange(channels * pixels, device=right.device).view(channels, pixels)
    structured = torch.ones(channels, dtype=torch.bool, device=right.device)
    missing = (right == 0).sum((1, 2)) + (down == 0).sum((1, 2))
    # The whole lattice is connected and the loss of an edge adds at most one component.
    suspects = (missing >= n_clusters).nonzero().squeeze(1)
    if len(suspects) == 0:
        return first, structured
    u, v, _ = _graph.lattice_edges(right[suspects], down[suspects])
    root = _graph.components(len(suspects) * pixels, u, v, longest=pixels).view(-1, pixels)
    start = pixels * torch.arange(len(suspects), device=root.device)[:, None]
    within = root - start
    n_components = (within == torch.arange(pixels, device=root.device)).sum(1)
    structured[suspects] = n_components <= n_clusters
    first[suspects] = within + pixels * suspects[:, None]
    return first, structured


def _agglomerate(
    pixels: _features.PixelFeatures,
    right: Tensor,
    down: Tensor,
    structured: Tensor,
    n_clusters: int,
    max_rounds: int,
) -> Tensor:
    """Merge nearest neighbours, round by round, until each channel has n_clusters clusters.

    A channel that is not structured has no edges and no part in this: it becomes one cluster in
    the first round.

    Args:
        pixels: The activations.
        right: (C, H, W - 1) squared distances of neighbours in a row; no edge where 0.
        down: (C, H - 1, W) the same in a column.
        structured: (C,) bool.
        n_clusters: Clusters per structured channel.
        max_rounds: Upper bound of the number of rounds.

    Returns:
        (C * H * W,) int64, the cluster of each pixel, numbered over all channels.
    """
    count = torch.where(structured, pixels.per_channel, 1)
    target = torch.where(structured, n_clusters, 1)
    channels = torch.arange(len(count), device=count.device)
    channel = channels.repeat_interleave(pixels.per_channel)
    node = torch.arange(len(channel), device=count.device)
    parent = torch.where(structured[channel], node, channel * pixels.per_channel)
    u, v, distance = _graph.lattice_edges(right, down)
    merges: list[Tensor] = []
    rows: Tensor | None = None
    while len(u) and len(merges) < max_rounds:
        parent, links, order = _graph.nearest_links(u, v, distance, parent)
        n_links = torch.zeros_like(count).scatter_add_(0, channel, links.long())
        surplus = count - target
        count = count - torch.minimum(n_links, surplus)
        facts = [(n_links > surplus).any(), count.sum(), (count - target).sum()]
        too_many, n_nodes, n_surplus = torch.stack(facts).tolist()
        if too_many:
            parent = _graph.cut_longest(parent, links, order, channel, surplus)
        merge = _graph.number_roots(parent, pixels.per_channel)
        merges.append(merge)
        if not n_surplus:
            break
        if rows is None:
            rows = pixels.averages(merge, n_nodes)
        else:
            rows = _features.averages(rows, merge, n_nodes)
        channel = channels.repeat_interleave(count, output_size=n_nodes)
        parent = torch.arange(n_nodes, device=count.device)
        u, v = merge.index_select(0, u), merge.index_select(0, v)
        useful = _graph.distinct(u, v, n_nodes) & (count > target)[channel].index_select(0, u)
        u, v = _graph.select(useful, u, v)
        distance = _features.distances(rows, u, v)
    cluster = merges.pop() if merges else node
    for merge in reversed(merges):
        cluster = cluster.index_select(0, merge)
    return cluster


def _number(first: Tensor, height: int, width: int, n_clusters: int) -> ReNAResult:
    """Number the clusters of each channel in the order of their first pixels.

    Args:
        first: (C, H*W) int64, the first pixel of the cluster of each pixel, over all channels.
        height: H.
        width: W.
        n_clusters: The requested number.
    """
    is_first = first.view(-1) == torch.arange(first.numel(), device=first.device)
    n_found = is_first.view_as(first).sum(1)
    rank = (is_first.cumsum(0) - 1).index_select(0, first.view(-1)).view_as(first)
    labels = rank - (n_found.cumsum(0) - n_found)[:, None]
    return ReNAResult(labels.view(-1, height, width), n_found, n_found <= n_clusters)
