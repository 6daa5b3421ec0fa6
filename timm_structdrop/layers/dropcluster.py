"""DropCluster (Chen, Gautier & Aydore, 2020, arXiv:2002.02997): drop clusters learned from data."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from timm_structdrop.layers._check import check_choice, check_drop_prob, check_integer, check_maps
from timm_structdrop.layers._learned_clusters import LearnedClusters, resample_labels
from timm_structdrop.layers._mask import apply_mask
from timm_structdrop.layers._registry import register
from timm_structdrop.layers._step import is_recomputed

__all__ = ["DropCluster2d", "cluster_mask", "drop_cluster_2d", "resample_labels"]

ROUNDINGS = ("stochastic", "floor")


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


@register(
    "dropcluster",
    summary="drops clusters of correlated pixels learned from the activations (ReNA)",
    paper="Chen et al. 2020, arXiv:2002.02997",
)
class DropCluster2d(LearnedClusters):
    """Drops clusters of pixels that :func:`timm_structdrop.cluster.rena` finds in the activations.

    Before its first fit the layer is the identity. A fit (:meth:`fit`, :meth:`request_fit`, or by
    itself after ``fit_start_step`` training forwards) runs Algorithm 1 on one mini-batch: it finds
    ``n_clusters`` clusters in every channel and marks the channels that have no such structure,
    which are zero from then on, in training and at inference.

    What is found is kept in buffers, see
    :class:`~timm_structdrop.layers._learned_clusters.LearnedClusters`. Only a layer with
    ``fit_start_step`` counts its training forwards in ``step``, each once: those that gradient
    checkpointing repeats do not count.

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
        super().__init__(channels, size, drop_prob, n_clusters, criterion, hopkins_threshold)
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
        self._requested_at: int | None = None
        self._n_steps: int | None = None  # `step`, once read: on a GPU each reading is a wait
        self._checked_size: tuple[int, ...] | None = None

    @classmethod
    def build(cls, channels: int, size: tuple[int, int], /, **settings: Any) -> DropCluster2d:
        return cls(channels, size, **settings)

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

    def request_fit(self, at: int) -> None:
        """Make the next training forward :meth:`fit` on its own input, before it drops anything.

        With ``torch.distributed`` running, every rank must ask: rank 0 fits and broadcasts.
        Under ``torch.compile`` run that forward in ``torch.compiler.set_stance("force_eager")``.
        """
        self._requested_at = at

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

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._checked_size = None
        self._n_steps = None
