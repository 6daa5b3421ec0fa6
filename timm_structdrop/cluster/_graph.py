"""Graph operations of ReNA on flat node and edge lists: every channel of a layer in one graph.

Nodes are numbered so that those of one channel are consecutive, edges never join two channels, so
one vectorized pass over the graph is one pass over each channel. All results are independent of
the order in which a device executes the scatters: they are minima and integer sums.
"""

import torch
from torch import Tensor

_NO_LINK = 2**63 - 1
_EDGE_BITS = 32
_SLOTS = 8


def flatten(parent: Tensor, longest: int) -> Tensor:
    """Root of every node by pointer jumping.

    Args:
        parent: (n,) int64, the next node on the way to the root; a root points to itself.
        longest: Upper bound of the number of nodes on a path.
    """
    hops = 1
    while hops < longest:
        jumped = parent.index_select(0, parent)
        # Asking whether anything moved saves most of the passes; on an accelerator the question
        # would cost a synchronization, more than the passes themselves.
        if parent.device.type == "cpu" and torch.equal(jumped, parent):
            break
        parent = jumped
        hops *= 2
    return parent


def number_roots(parent: Tensor, longest: int) -> Tensor:
    """(n,) int64: the trees of a forest, numbered in the order of their roots.

    Args:
        parent: (n,) int64, see flatten.
        longest: Upper bound of the number of nodes on a path.
    """
    is_root = parent == torch.arange(len(parent), device=parent.device)
    return (is_root.cumsum(0) - 1).index_select(0, flatten(parent, longest))


def first_members(group: Tensor) -> Tensor:
    """(n,) int64: for each position the first position with the same group number.

    Args:
        group: (n,) int64 in [0, n).
    """
    position = torch.arange(len(group), device=group.device)
    first = torch.full_like(group, len(group)).scatter_reduce_(0, group, position, "amin")
    return first.index_select(0, group)


def select(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The elements of each tensor where the mask is True.

    Args:
        mask: (n,) bool.
        tensors: (n,) each.
    """
    index = mask.nonzero().squeeze(1)
    return [tensor.index_select(0, index) for tensor in tensors]


def lattice_edges(right: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Edges of positive length of C lattices of H x W nodes each, numbered one after the other.

    Args:
        right: (C, H, W - 1), lengths between neighbours in a row.
        down: (C, H - 1, W), lengths between neighbours in a column.

    Returns:
        u, v and length, each (E,); those in rows first.
    """
    channels, height, width = right.shape[0], right.shape[1], down.shape[2]
    node = torch.arange(channels * height * width, device=right.device)
    node = node.view(channels, height, width)
    u = torch.cat([node[:, :, :-1].reshape(-1), node[:, :-1].reshape(-1)])
    v = torch.cat([node[:, :, 1:].reshape(-1), node[:, 1:].reshape(-1)])
    length = torch.cat([right.reshape(-1), down.reshape(-1)])
    u, v, length = select(length > 0, u, v, length)
    return u, v, length


def components(n_nodes: int, u: Tensor, v: Tensor, longest: int) -> Tensor:
    """Connected components: (n_nodes,) int64, the smallest node of each node's component.

    Every root hooks onto its smallest neighbouring root until no edge joins two roots; a root
    hooks at least once in any two passes, so there are O(log n_nodes) of them.

    Args:
        n_nodes: Number of nodes.
        u: (E,) int64, one end of each edge.
        v: (E,) int64, the other end.
        longest: Upper bound of the size of a component.
    """
    parent = torch.arange(n_nodes, device=u.device)
    while u.numel():
        parent.scatter_reduce_(0, torch.maximum(u, v), torch.minimum(u, v), "amin")
        parent = flatten(parent, longest)
        u, v = parent.index_select(0, u), parent.index_select(0, v)
        u, v = select(u != v, u, v)
    return parent


def nearest_links(
    u: Tensor, v: Tensor, weight: Tensor, parent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Forest in which every node with an edge points to its nearest neighbour.

    Edges are compared by (weight as float32, position in the list), a total order: the only cycles
    of the nearest-neighbour graph are then pairs of mutual neighbours, whose smaller node becomes
    the root.

    Args:
        u: (E,) int64, one end of each edge, E in [1, 2^31).
        v: (E,) int64, the other end.
        weight: (E,) float, not negative.
        parent: (n,) int64, where the nodes without an edge point.

    Returns:
        parent (n,) int64; links (n,) bool, the nodes that point to a neighbour, one for each
        distinct link; order (n,) int64, sorts the links from the shortest to the longest.
    """
    node = torch.arange(len(parent), device=u.device)
    # The bits of a float that is not negative sort like the float itself.
    order = weight.float().view(torch.int32).to(torch.int64) << _EDGE_BITS
    order |= torch.arange(len(u), device=u.device)
    best = torch.full_like(node, _NO_LINK)
    best.scatter_reduce_(0, u, order, "amin").scatter_reduce_(0, v, order, "amin")
    linked = best != _NO_LINK
    edge = torch.where(linked, best & (2**_EDGE_BITS - 1), 0)
    neighbour = u.index_select(0, edge) + v.index_select(0, edge) - node
    parent = torch.where(linked, neighbour, parent)
    mutual_root = (parent.index_select(0, parent) == node) & (node < parent)
    parent = torch.where(mutual_root, node, parent)
    return parent, linked & (parent != node), best


def cut_longest(
    parent: Tensor, links: Tensor, order: Tensor, channel: Tensor, keep: Tensor
) -> Tensor:
    """Keep the `keep[c]` shortest links of channel c and make a root of every other linked node.

    Args:
        parent: (n,) int64, changed in place and returned.
        links: (n,) bool, the nodes whose pointer is a link that may be cut.
        order: (n,) int64, sorts the links from the shortest to the longest.
        channel: (n,) int64.
        keep: (C,) int64, the number of links that stay in each channel.
    """
    node = links.nonzero().squeeze(1)
    node = node[order[node].argsort()]
    node = node[channel[node].argsort(stable=True)]
    owner = channel[node]
    per_channel = torch.zeros_like(keep).scatter_add_(0, owner, torch.ones_like(owner))
    first = per_channel.cumsum(0) - per_channel
    rank = torch.arange(len(node), device=node.device) - first[owner]
    cut = node[rank >= keep[owner]]
    parent[cut] = cut
    return parent


def distinct(u: Tensor, v: Tensor, n_nodes: int) -> Tensor:
    """(E,) bool: False for loops and for most repetitions of an earlier edge.

    Merging clusters leaves many parallel edges, and each costs one distance between clusters. A
    small hash table of first positions per node finds nearly all of them for a fraction of a
    sort; those that collide with another edge stay, which costs time and changes nothing else.

    Args:
        u: (E,) int64, one end of each edge, E < 2^31.
        v: (E,) int64, the other end.
        n_nodes: Number of nodes.
    """
    position = torch.arange(len(u), dtype=torch.int32, device=u.device)
    low, high = torch.minimum(u, v), torch.maximum(u, v)
    slot = low.mul_(_SLOTS).add_(high & (_SLOTS - 1))
    table = position.new_full((n_nodes * _SLOTS,), torch.iinfo(torch.int32).max)
    first = table.scatter_reduce_(0, slot, position, "amin").index_select(0, slot)
    # Edges in the same slot have the same lower node.
    collides = high.index_select(0, first) != high
    return (u != v) & ((first == position) | collides)
