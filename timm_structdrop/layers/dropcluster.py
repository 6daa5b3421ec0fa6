"""DropCluster (Chen, Gautier & Aydore, 2020, arXiv:2002.02997): drop clusters learned from data."""

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
from timm_structdrop.layers.base import (
    FittedLayer,
    Paper,
    Placement,
    check_choice,
    check_drop_prob,
    check_fraction,
    check_integer,
    check_maps,
    is_recomputed,
    register,
)
from timm_structdrop.layers.blocks import apply_mask

__all__ = ["DropCluster2d", "cluster_mask", "drop_cluster_2d", "resample_labels"]

ROUNDINGS = ("stochastic", "floor")
LEAST_SIDE = 3  # of maps whose Spatial Hopkins statistic is computed


def cluster_mask(
    labels: Tensor,
    structured: Tensor,
    drop_prob: float | Tensor,
    n_clusters: int,
    rounding: str = "stochastic",
) -> Tensor:
    """The training mask M of Algorithm 2, one for the whole batch.

    Each structured channel loses ``m`` of its ``n_clusters`` clusters, drawn without replacement.
    ``rounding="floor"`` is the paper's m = floor(p n); ``"stochastic"`` adds one with the
    probability of the remainder, channel by channel, so that E[m] = p n (the paper's rule with
    p = 0.1 and n = 15 always drops 1 cluster, a rate of 0.067). Unstructured channels are zero.

    Args:
        labels: cluster of each pixel, integers in [0, n_clusters), (C, H, W).
        structured: False where the whole channel is masked, (C,) bool.
        drop_prob: p in [0, 1). A 0-d tensor, which is not checked, keeps ``torch.compile`` from
            specialising on it.
        n_clusters: clusters per structured channel.
        rounding: ``"floor"`` or ``"stochastic"``.

    Returns:
        True where a unit is kept, (C, H, W) bool.

    Raises:
        ValueError: p is a float outside [0, 1), or ``rounding`` is unknown.
    """
    check_choice("rounding", rounding, ROUNDINGS)
    if not isinstance(drop_prob, Tensor):
        drop_prob = check_drop_prob(drop_prob)
    channels = labels.shape[0]
    expected = torch.as_tensor(drop_prob, dtype=torch.float32, device=labels.device) * n_clusters
    # 0.7 * 10 is 6.9999998 in float32: the tolerance keeps a whole number whole
    count = (expected + 1e-5).floor()
    n_dropped = count.expand(channels)
    if rounding == "stochastic":
        remainder = (expected - count).clamp(min=0.0)
        n_dropped = count + (torch.rand(channels, device=labels.device) < remainder)
    order = torch.rand(channels, n_clusters, device=labels.device).argsort(dim=1)
    dropped = order < n_dropped[:, None]
    kept = ~dropped.gather(1, labels.flatten(1).long()).view(labels.shape)
    return kept & structured[:, None, None]


def drop_cluster_2d(
    x: Tensor,
    labels: Tensor,
    structured: Tensor,
    drop_prob: float | Tensor = 0.1,
    n_clusters: int = 15,
    training: bool = True,
    rounding: str = "stochastic",
) -> Tensor:
    """Algorithm 2 of the paper: ``x * M * count(M) / count_ones(M)``.

    In training M comes from :func:`cluster_mask`; at inference M only holds the zeros of the
    unstructured channels, which stay masked.

    Args:
        x: activations (B, C, H, W).
        labels: (C, H, W) integers in [0, n_clusters).
        structured: (C,) bool.
        drop_prob: expected fraction of clusters dropped, in [0, 1); a 0-d tensor is not checked.
        n_clusters: clusters per structured channel.
        training: draw clusters to drop; if False, ``labels``, ``drop_prob``, ``n_clusters`` and
            ``rounding`` are not read.
        rounding: ``"floor"`` or ``"stochastic"``, see :func:`cluster_mask`.

    Returns:
        (B, C, H, W) in the dtype and memory format of ``x``.

    Raises:
        ValueError: ``x``, ``labels`` or ``structured`` does not have its shape, or a setting is
            out of range.
    """
    check_maps(x)
    maps = tuple(x.shape[1:])
    if tuple(structured.shape) != maps[:1] or (training and tuple(labels.shape) != maps):
        raise ValueError(
            f"labels must be (C, H, W) and structured (C,) for x with (C, H, W) = {maps}; "
            f"got {tuple(labels.shape)} and {tuple(structured.shape)}"
        )
    if not training:
        return apply_mask(x, structured[None, :, None, None])
    return apply_mask(x, cluster_mask(labels, structured, drop_prob, n_clusters, rounding)[None])


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


@register(
    "dropcluster",
    summary="drops clusters of correlated pixels learned from the activations (ReNA)",
    paper=Paper.with_bibtex(
        "Chen et al. 2020, arXiv:2002.02997",
        "DropCluster",
        "DropCluster: A structured dropout for convolutional networks",
        "https://arxiv.org/abs/2002.02997",
        "article",
        "chen2020dropcluster",
        author="Chen, Liyan and Gautier, Philip and Aydore, Sergul",
        journal="arXiv preprint arXiv:2002.02997",
        year="2020",
    ),
    placement=Placement(where=("stem",), last_stages=0),
)
class DropCluster2d(FittedLayer):
    """Drops clusters of pixels that :func:`timm_structdrop.cluster.rena` finds in the activations.

    Before its first fit the layer is the identity. A fit (:meth:`fit`, :meth:`request_fit`, or by
    itself after ``fit_start_step`` training forwards) runs Algorithm 1 on one mini-batch: it finds
    ``n_clusters`` clusters in every channel and marks the channels that have no such structure,
    which are zero from then on, in training and at inference.

    What is found lives in persistent buffers of fixed shape and integer type, so whatever carries a
    state_dict carries it: ``labels`` (C, H, W) uint8, ``structured`` (C,) bool, ``fitted_at``
    (-1 = never), ``fitted_size`` (the map the clusters were found on), ``step`` (training forwards
    seen). A state_dict without them loads strictly and leaves the layer unfitted; labels of another
    resolution are resampled to this layer's. Only a layer with ``fit_start_step`` counts its
    training forwards, each once: those that gradient checkpointing repeats do not count.

    Args:
        channels: C of the maps.
        size: (H, W) of the stored labels; other map sizes work, their labels are resampled.
        drop_prob: expected fraction of clusters dropped per structured channel, in [0, 1).
        n_clusters: clusters per channel, in [2, min(256, H*W)].
        rounding: ``"stochastic"`` or the paper's ``"floor"``, see :func:`cluster_mask`.
        criterion: what makes a channel unstructured: ``"rena"`` (more than ``n_clusters`` clusters
            found) or ``"hopkins"`` (also: mean Spatial Hopkins statistic below the threshold; on
            maps of at least 3x3).
        hopkins_threshold: in [0, 1]; a channel without structure scores 0.5, or 0 if constant.
        fit_start_step: training forward (1, 2, ...) of the first fit in a loop that does not ask
            for fits; None leaves fitting to the training task. Counting is Python: under
            ``torch.compile`` each training forward has a graph break in front of the layer, and
            ``fullgraph=True`` needs None.
        fit_every_steps: training forwards between later fits; None fits once.

    Raises:
        ValueError: a setting is out of range, or a map has fewer pixels than ``n_clusters`` or is
            too small for the criterion.
    """

    keeps_map_state = True
    fitted_size: Tensor
    step: Tensor

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        drop_prob: float = 0.1,
        n_clusters: int = 15,
        rounding: str = "stochastic",
        criterion: str = "rena",
        hopkins_threshold: float = 0.6,
        fit_start_step: int | None = None,
        fit_every_steps: int | None = None,
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
        self.rounding = check_choice("rounding", rounding, ROUNDINGS)
        rule = "an integer of at least 1 or None"
        if fit_start_step is not None:
            fit_start_step = check_integer("fit_start_step", fit_start_step, rule)
        if fit_every_steps is not None:
            fit_every_steps = check_integer("fit_every_steps", fit_every_steps, rule)
            if fit_start_step is None:
                raise ValueError(f"fit_every_steps needs fit_start_step; got {fit_every_steps}")
        self.fit_start_step = fit_start_step
        self.fit_every_steps = fit_every_steps
        self.fits_itself = fit_start_step is not None
        self.register_buffer("labels", torch.zeros(channels, height, width, dtype=torch.uint8))
        self.register_buffer("structured", torch.ones(channels, dtype=torch.bool))
        self.register_buffer("fitted_at", torch.tensor(-1))
        self.register_buffer("fitted_size", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("step", torch.tensor(0))
        self._requested_at: int | None = None
        self._n_steps: int | None = None  # `step`, once read: on a GPU each reading is a wait
        self._checked_size: tuple[int, ...] | None = None

    @classmethod
    def build(cls, channels: int, size: tuple[int, int], /, **settings: Any) -> DropCluster2d:
        return cls(channels, size, **settings)

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

    def request_fit(self, at: int) -> None:
        """Make the next training forward :meth:`fit` on its own input, before it drops anything.

        With ``torch.distributed`` running, every rank must ask: rank 0 fits and broadcasts.
        Under ``torch.compile`` run that forward in ``torch.compiler.set_stance("force_eager")``.
        """
        self._requested_at = at

    def draw_mask(self) -> Tensor:
        return cluster_mask(
            self.labels.cpu(),
            self.structured.cpu(),
            self.target_drop_prob,
            self.n_clusters,
            self.rounding,
        )

    def forward(self, x: Tensor) -> Tensor:
        eager = not torch.compiler.is_compiling()
        if self.training:
            if eager:
                self._check_input(x)
            if eager or self.fit_start_step is not None:
                self._fit_if_due(x)
            if eager and not x.is_cuda and not self.is_fitted:
                return x
            labels = resample_labels(self.labels, (x.shape[-2], x.shape[-1]))
            rate = self.drop_prob * (self.fitted_at >= 0)
            return drop_cluster_2d(
                x, labels, self.structured, rate, self.n_clusters, True, self.rounding
            )
        if eager and not x.is_cuda and bool(self.structured.all()):
            return x
        return drop_cluster_2d(x, self.labels, self.structured, training=False)

    @torch.compiler.disable
    def _fit_if_due(self, x: Tensor) -> None:
        if is_recomputed():
            return
        at, self._requested_at = self._requested_at, None
        if self.fit_start_step is not None:
            self._n_steps = 1 + (int(self.step) if self._n_steps is None else self._n_steps)
            self.step.add_(1)
            since = self._n_steps - self.fit_start_step
            if since == 0 or (
                since > 0 and self.fit_every_steps and since % self.fit_every_steps == 0
            ):
                at = self._n_steps
        if at is not None:
            self.fit_on_all_ranks(x.detach(), at)

    def _check_input(self, x: Tensor) -> None:
        check_maps(x)
        size = tuple(x.shape[-2:])
        if size == self._checked_size:
            return
        self.check_size(size)
        self._checked_size = size
        fitted_size = tuple(self.fitted_size.tolist())
        if self.is_fitted and fitted_size != size:
            warnings.warn(
                f"DropCluster2d: clusters fitted on {fitted_size[0]}x{fitted_size[1]} maps are "
                f"resampled to {size[0]}x{size[1]} until the next fit",
                stacklevel=3,
            )

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
        fresh = {
            prefix + "labels": torch.zeros_like(self.labels),
            prefix + "structured": torch.ones_like(self.structured),
            prefix + "fitted_at": torch.full_like(self.fitted_at, -1),
            prefix + "fitted_size": torch.zeros_like(self.fitted_size),
            prefix + "step": torch.zeros_like(self.step),
        }
        if not any(name in state_dict for name in fresh):
            state_dict.update(fresh)
        labels = state_dict.get(prefix + "labels")
        if labels is not None and labels.ndim == 3 and len(labels) == len(self.labels):
            size = (self.labels.shape[1], self.labels.shape[2])
            state_dict[prefix + "labels"] = resample_labels(labels, size)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._checked_size = None
        self._n_steps = None
