"""The clusters of a layer: how they are found, in which buffers they are kept and carried along."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from timm_structdrop.cluster import (
    NotFiniteError,
    ReNAResult,
    adjusted_rand_index,
    rena,
    spatial_hopkins,
)
from timm_structdrop.layers._base import StructDropLayer
from timm_structdrop.layers._check import check_choice, check_fraction, check_integer

__all__ = ["LearnedClusters", "resample_labels"]

LEAST_SIDE = 3  # of maps whose Spatial Hopkins statistic is computed
STATE = ("labels", "structured", "fitted_at", "fitted_size", "step")


def resample_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels at another resolution: each pixel takes the label at its centre.

    Going up and back down again returns the labels it started from.

    Args:
        labels: (C, H, W), of any dtype.
        size: (h, w).

    Returns:
        (C, h, w).
    """
    if labels.shape[-2:] == tuple(size):
        return labels
    for dim, new in ((1, size[0]), (2, size[1])):
        centres = torch.arange(new, device=labels.device) + 0.5
        labels = labels.index_select(dim, (centres * labels.shape[dim] / new).long())
    return labels


class LearnedClusters(StructDropLayer):
    """A layer with clusters that :func:`timm_structdrop.cluster.rena` finds in its activations.

    They live in persistent buffers of fixed shape and integer type, so whatever carries a
    state_dict carries them: ``labels`` (C, H, W) uint8, ``structured`` (C,) bool, ``fitted_at``
    (-1 = never), ``fitted_size`` (the map the clusters were found on), ``step`` (training forwards
    seen, by a layer that counts them). A state_dict without them loads strictly and leaves the
    layer unfitted; labels of another resolution are resampled to this layer's.

    Args:
        channels: C of the maps.
        size: (H, W) of the stored labels.
        drop_prob: rate in [0, 1).
        n_clusters: clusters per channel, in [2, min(256, H*W)].
        criterion: what makes a channel unstructured: ``"rena"`` (more than ``n_clusters`` clusters
            found) or ``"hopkins"`` (also: mean Spatial Hopkins statistic below the threshold; on
            maps of at least 3x3).
        hopkins_threshold: in [0, 1].

    Raises:
        ValueError: a setting is out of range, or the maps are too small for the criterion.
    """

    keeps_map_state = True
    labels: Tensor
    structured: Tensor
    fitted_at: Tensor
    fitted_size: Tensor
    step: Tensor

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        drop_prob: float,
        n_clusters: int,
        criterion: str,
        hopkins_threshold: float,
    ) -> None:
        super().__init__(drop_prob)
        height, width = size
        if channels < 1 or height < 1 or width < 1:
            raise ValueError(f"channels, H and W must be at least 1; got {channels}, {size}")
        rule = f"in [2, min(256, H*W = {height * width})]"
        self.n_clusters = check_integer(
            "n_clusters", n_clusters, rule, low=2, high=min(256, height * width)
        )
        self.criterion = check_choice("criterion", criterion, ("rena", "hopkins"))
        self.hopkins_threshold = check_fraction("hopkins_threshold", hopkins_threshold, "[0, 1]")
        self.check_size((height, width))
        self.last_fit: dict[str, Any] | None = None
        self.register_buffer("labels", torch.zeros(channels, height, width, dtype=torch.uint8))
        self.register_buffer("structured", torch.ones(channels, dtype=torch.bool))
        self.register_buffer("fitted_at", torch.tensor(-1))
        self.register_buffer("fitted_size", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("step", torch.tensor(0))

    @property
    def is_fitted(self) -> bool:
        """Whether clusters have been found."""
        return int(self.fitted_at) >= 0

    def check_size(self, size: tuple[int, ...]) -> None:
        """Raise ValueError for maps of ``size`` = (H, W) on which the clusters cannot be found."""
        height, width = size
        if self.n_clusters > height * width:
            raise ValueError(
                f"n_clusters must be in [2, H*W = {height * width}] of the map; "
                f"got {self.n_clusters} on a {height}x{width} map"
            )
        if self.criterion == "hopkins" and min(size) < LEAST_SIDE:
            raise ValueError(
                f"maps must be at least {LEAST_SIDE}x{LEAST_SIDE} where criterion is 'hopkins'; "
                f"got {height}x{width}"
            )

    @torch.no_grad()
    def fit(self, activations: Tensor, at: int = 0) -> ReNAResult | None:
        """Algorithm 1: find the clusters and the unstructured channels of one mini-batch.

        The old state stays, with a warning, if the activations are not finite or if no channel
        has structure.

        Args:
            activations: this layer's input, (B, C, H, W).
            at: what to record as the time of the fit, an epoch or update index >= 0.

        Returns:
            The clusters as found, at the resolution of the activations; None if they are not
            finite.

        Raises:
            ValueError: the shape is not (B, C, H, W) with this layer's C, H*W < n_clusters, or the
                criterion is ``"hopkins"`` and the maps are smaller than 3x3.
        """
        if activations.ndim != 4 or activations.shape[1] != self.labels.shape[0]:
            raise ValueError(
                f"activations must be (B, C = {self.labels.shape[0]}, H, W); "
                f"got {tuple(activations.shape)}"
            )
        self.check_size(tuple(activations.shape[-2:]))
        started = time.perf_counter()
        try:
            result = rena(activations, self.n_clusters)
        except NotFiniteError as error:
            warnings.warn(f"DropCluster2d: {error}; the old clusters are kept", stacklevel=2)
            return None
        structured = result.structured & self._hopkins_structured(activations, at)
        if not bool(structured.any()):
            warnings.warn(
                f"DropCluster2d: none of the {len(structured)} channels has structure; "
                "the old clusters are kept",
                stacklevel=2,
            )
            return result
        height, width = activations.shape[-2:]
        stored = resample_labels(result.labels, (self.labels.shape[1], self.labels.shape[2]))
        stored = torch.where(structured[:, None, None], stored, 0).to(torch.uint8)
        facts = self._facts(stored, structured, at)
        self.labels.copy_(stored)
        self.structured.copy_(structured)
        self.fitted_at.fill_(at)
        self.fitted_size.copy_(torch.tensor([height, width]))
        self.last_fit = {**facts, "seconds": time.perf_counter() - started}
        return result

    def fit_on_all_ranks(self, activations: Tensor, at: int) -> None:
        """:meth:`fit`; where ``torch.distributed`` runs, on rank 0, for all the others.

        Args:
            activations: this layer's input on this rank, (B, C, H, W).
            at: the time of the fit, an epoch or update index >= 0.

        Raises:
            ValueError: as :meth:`fit`, on rank 0.
            RuntimeError: the fit has failed on rank 0, on all the others.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            self.fit(activations, at)
            return
        error: Exception | None = None
        if dist.get_rank() == 0:
            try:
                self.fit(activations, at)
            except Exception as raised:  # whatever it is, the others are waiting
                error = raised
        failed = torch.tensor(int(error is not None), device=self.labels.device)
        dist.broadcast(failed, src=0)
        if error is not None:
            raise error
        if failed:
            raise RuntimeError("the clusters of all ranks are fitted on rank 0, where it failed")
        structured = self.structured.to(torch.uint8)  # gloo has no bool
        for state in (self.labels, structured, self.fitted_at, self.fitted_size):
            dist.broadcast(state, src=0)
        self.structured.copy_(structured)

    def _hopkins_structured(self, activations: Tensor, at: int) -> Tensor:
        if self.criterion == "rena":
            return torch.ones_like(self.structured)
        # a generator of its own, so that a fit does not shift the training's random numbers
        generator = torch.Generator(activations.device).manual_seed(at)
        return spatial_hopkins(activations, generator=generator) >= self.hopkins_threshold

    def _facts(self, labels: Tensor, structured: Tensor, at: int) -> dict[str, Any]:
        ari = None
        both = structured & self.structured
        if self.is_fitted and bool(both.any()):
            ari = float(adjusted_rand_index(self.labels[both], labels[both]).mean())
        return {
            "at": at,
            "n_clusters": self.n_clusters,
            "channels": len(structured),
            "unstructured": int((~structured).sum()),
            "adjusted_rand_index": ari,
        }

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if not any(prefix + name in state_dict for name in STATE):
            fresh = (
                torch.zeros_like(self.labels),
                torch.ones_like(self.structured),
                torch.full_like(self.fitted_at, -1),
                torch.zeros_like(self.fitted_size),
                torch.zeros_like(self.step),
            )
            state_dict.update(zip((prefix + name for name in STATE), fresh, strict=True))
        labels = state_dict.get(prefix + "labels")
        if labels is not None and labels.ndim == 3 and len(labels) == len(self.labels):
            size = (self.labels.shape[1], self.labels.shape[2])
            state_dict[prefix + "labels"] = resample_labels(labels, size)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
