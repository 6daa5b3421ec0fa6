"""Do learned clusters follow the data? Correlations within clusters against other cells.

A cluster is worth dropping as a whole if its pixels carry the same information. The measure here is
the Pearson correlation, over images that the clusters were not fitted on, of the pairs of pixels
that share a cell. It is taken for the learned clusters and for cells that know nothing of the data.

Clusters are of very unequal sizes, and large cells hold far more pairs, of pixels further apart. So
there are two means. Over cells, each cell counts once: clusters are dropped with equal probability,
so this is what a dropped cluster looks like. Over pairs, the largest cells decide. And two of the
comparisons have exactly the clusters' sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timm_structdrop.errors import UserError

__all__ = [
    "CELLS",
    "MEANS",
    "ClusterStudy",
    "cluster_study",
    "matched_squares",
    "square_cells",
    "voronoi_cells",
    "within_correlation",
]

CELLS = {
    "clusters": "the learned clusters",
    "squares": "a tiling by squares of their mean size",
    "voronoi": "as many random Voronoi cells",
    "matched": "a square of each cluster's size and centre",
    "turned": "the clusters turned by 180 degrees",
}
MEANS = ("over_cells", "over_pairs")


@dataclass(frozen=True, eq=False)
class ClusterStudy:
    """Mean within-cell correlations of each channel that was compared.

    Attributes:
        name: the place of the layer.
        channels: their K indices.
        correlations: by key of :data:`CELLS`, (K, 2) float64: the means in the order of
            :data:`MEANS`.
        n_images: images the correlations are over.
    """

    name: str
    channels: list[int]
    correlations: dict[str, Tensor]
    n_images: int

    def numbers(self) -> dict[str, Any]:
        """Mean and standard deviation over channels, and how often the clusters win; JSON-able."""
        figures: dict[str, Any] = {}
        own = self.correlations["clusters"]
        for key, values in self.correlations.items():
            figures[key] = {"what": CELLS[key]}
            for mean, column, reference in zip(MEANS, values.T, own.T, strict=True):
                gain = reference - column
                figures[key][mean] = {
                    "mean": float(column.mean()),
                    "std": float(column.std(correction=0)),
                    "clusters_are_higher_by": float(gain.mean()),
                    "clusters_are_higher_in_channels": int((gain > 0).sum()),
                }
        return {
            "layer": self.name,
            "statistic": "correlation over images of pixel pairs in the same cell",
            "n_images": self.n_images,
            "n_channels": len(self.channels),
            "cells": figures,
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per channel."""
        for index, channel in enumerate(self.channels):
            row: dict[str, Any] = {"layer": self.name, "channel": channel}
            for key, values in self.correlations.items():
                for mean, value in zip(MEANS, values[index].tolist(), strict=True):
                    row[f"{key}_{mean}"] = round(value, 6)
            yield row


def within_correlation(maps: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Correlation over samples of the pairs of pixels that share a cell.

    With z the pixels standardised over the N samples, the correlations of the pairs of a cell of n
    pixels add up to (|sum_i z_i|^2 / N - n) / 2, so no matrix of all pairs is needed. Pixels that
    are constant over the samples have no correlation and are left out.

    Args:
        maps: (N, P) with N >= 2: one channel, its P pixels flattened.
        cells: which pixels belong to each of K cells, which may overlap, (K, P) bool.

    Returns:
        The mean over the pairs of each cell, (K,) float64 in [-1, 1], NaN without a pair; and the
        number of pairs, (K,) float64.

    Raises:
        UserError: the shapes do not fit, or there are fewer than two samples.
    """
    if maps.ndim != 2 or cells.ndim != 2 or len(maps) < 2 or maps.shape[1] != cells.shape[1]:
        raise UserError(
            "correlations need maps (N >= 2, P) and cells (K, P); "
            f"got {tuple(maps.shape)} and {tuple(cells.shape)}"
        )
    z = maps.double() - maps.double().mean(0)
    variance = z.square().mean(0)
    varies = variance > 1e-10 * variance.max()
    members = (cells & varies).double()
    z = z * torch.where(varies, variance, 1.0).rsqrt()
    pixels = members.sum(1)
    pairs = pixels * (pixels - 1) / 2
    total = ((z @ members.T).square().mean(0) - pixels) / 2
    return torch.where(pairs > 0, total / pairs, torch.nan), pairs


def square_cells(size: tuple[int, int], n_cells: int) -> Tensor:
    """A tiling of an H x W map by cells as square and as near to ``n_cells`` as a grid allows.

    Returns:
        (H, W) int64, numbered in raster order.
    """
    height, width = size
    shorter, longer = min(size), max(size)
    across = min(shorter, max(1, round(shorter / math.sqrt(height * width / n_cells))))
    along = min(longer, max(1, round(n_cells / across)))
    rows, columns = (across, along) if height <= width else (along, across)
    y = torch.arange(height) * rows // height
    x = torch.arange(width) * columns // width
    return y[:, None] * columns + x


def voronoi_cells(size: tuple[int, int], n_cells: int, generator: torch.Generator) -> Tensor:
    """Each pixel belongs to the nearest of ``n_cells`` different random pixels, (H, W) int64."""
    height, width = size
    centres = torch.randperm(height * width, generator=generator)[:n_cells]
    y, x = torch.arange(height)[:, None, None], torch.arange(width)[:, None]
    distance = (y - centres // width).square() + (x - centres % width).square()
    return distance.argmin(-1)


def matched_squares(cells: Tensor) -> Tensor:
    """For each cell, the square of as many pixels around its centre, moved to fit into the map.

    These are the n pixels nearest to the centre in the maximum norm, the first in raster order
    among equals, so the last row or column of the square may not be full.

    Args:
        cells: (K, H, W) bool.

    Returns:
        (K, H, W) bool.
    """
    height, width = cells.shape[1:]
    pixels = cells.flatten(1).sum(1)
    half = pixels.double().sqrt() / 2
    offset = torch.zeros(len(cells), height, width, dtype=torch.float64)
    for dim, length in ((1, height), (2, width)):
        place = torch.arange(length, dtype=torch.float64)
        weight = cells.sum(3 - dim).double()
        centre = (weight * place).sum(1) / pixels.clamp(min=1)
        # a square wider than the map is centred on it
        low, high = half - 0.5, length - 0.5 - half
        centre = torch.where(low < high, centre.clamp(low, high), (length - 1) / 2)
        distance = (place - centre[:, None]).abs()
        offset = torch.maximum(offset, distance[:, :, None] if dim == 1 else distance[:, None])
    rank = offset.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < pixels[:, None]).view(cells.shape)


def cluster_study(
    name: str,
    activations: Tensor,
    labels: Tensor,
    structured: Tensor,
    n_clusters: int,
    *,
    n_random: int = 10,
    seed: int = 0,
) -> ClusterStudy:
    """Compare a layer's clusters with cells that know nothing of the data.

    Args:
        name: the place of the layer.
        activations: its input for images that the clusters were not fitted on, (N, C, H, W).
        labels: (C, H, W) in [0, n_clusters).
        structured: (C,) bool; the other channels are left out, as are channels without a cluster of
            two pixels that vary.
        n_clusters: clusters per structured channel.
        n_random: Voronoi partitions that a channel's figure is the mean of, at least 1.
        seed: of these.

    Raises:
        UserError: the shapes do not fit, there are fewer than two images, or no channel is left.
    """
    if activations.ndim != 4 or activations.shape[1:] != labels.shape:
        raise UserError(
            f"a study needs activations (N, C, H, W) for labels {tuple(labels.shape)}; "
            f"got {tuple(activations.shape)}"
        )
    size = (labels.shape[1], labels.shape[2])
    generator = torch.Generator().manual_seed(seed)
    random = [_members(voronoi_cells(size, n_clusters, generator)) for _ in range(n_random)]
    squares = _members(square_cells(size, n_clusters))
    channels, found = [], []
    for channel in structured.nonzero().flatten().tolist():
        clusters = _members(labels[channel])
        cells = {
            "clusters": [clusters],
            "squares": [squares],
            "voronoi": random,
            "matched": [matched_squares(clusters)],
            "turned": [clusters.flip(1, 2)],
        }
        maps = activations[:, channel].flatten(1)
        means = {key: _means(maps, variants) for key, variants in cells.items()}
        if bool(means["clusters"].isfinite().all()):
            channels.append(channel)
            found.append(means)
    if not channels:
        raise UserError(f"a study of clusters needs a channel that varies; {name} has none")
    correlations = {key: torch.stack([means[key] for means in found]) for key in CELLS}
    return ClusterStudy(name, channels, correlations, len(activations))


def _members(labels: Tensor) -> Tensor:
    """(K, H, W) bool of labels (H, W); cells without a pixel are left out."""
    return labels.unique()[:, None, None] == labels


def _means(maps: Tensor, variants: list[Tensor]) -> Tensor:
    """Means over cells and over pairs, (2,), averaged over several sets of cells."""
    means = []
    for cells in variants:
        correlation, pairs = within_correlation(maps, cells.flatten(1))
        over_pairs = (correlation.nan_to_num() * pairs).sum() / pairs.sum()
        means.append(torch.stack([correlation.nanmean(), over_pairs]))
    return torch.stack(means).nanmean(0)
