"""Colours for label maps: clusters that touch look different."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["colour_labels"]

# Twenty colours of different hue and lightness; grey and pure red are kept for marks.
HEX = (
    "1f77b4ff7f0e2ca02c9467bd8c564be377c2bcbd2217becfaec7e8ffbb78"
    "98df8ac5b0d5c49c94f7b6d2dbdb8d9edae508306b00441b7f2704fde725"
)
PALETTE = np.frombuffer(bytes.fromhex(HEX), dtype=np.uint8).reshape(-1, 3) / 255


def colour_labels(labels: NDArray[np.integer]) -> NDArray[np.floating]:
    """An RGB picture of a label map, (H, W) to (H, W, 3) in [0, 1].

    Clusters get their colours in the order of their numbers: one that no touching cluster has
    (corners touch too), of these one used least so far, of these the one most unlike those that
    touch. Up to 20 clusters all have colours of their own.
    """
    names, flat = np.unique(labels, return_inverse=True)
    index = flat.reshape(labels.shape)
    touching = _touching(index, len(names))
    chosen = np.full(len(names), -1)
    used = np.zeros(len(PALETTE))
    for cluster in range(len(names)):
        around = chosen[touching[cluster] & (chosen >= 0)]
        cost = used * 10.0
        if len(around):
            distance = np.abs(PALETTE[:, None] - PALETTE[around]).sum(-1).min(1)
            cost = cost - distance + 1e6 * (distance == 0)
        chosen[cluster] = int(cost.argmin())
        used[chosen[cluster]] += 1
    return PALETTE[chosen][index]


def _touching(index: NDArray[np.integer], n: int) -> NDArray[np.bool_]:
    """Which clusters share an edge or a corner, (n, n)."""
    touching = np.zeros((n, n), dtype=bool)
    for a, b in (
        (index[1:], index[:-1]),
        (index[:, 1:], index[:, :-1]),
        (index[1:, 1:], index[:-1, :-1]),
        (index[1:, :-1], index[:-1, 1:]),
    ):
        touching[a, b] = touching[b, a] = True
    np.fill_diagonal(touching, False)
    return touching
