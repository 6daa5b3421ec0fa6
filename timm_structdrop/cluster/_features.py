"""What ReNA computes from activations: distances along edges and averages over clusters.

The passes over activations go block by block. On a CPU a block stays in the cache while it is
subtracted, squared and summed, or transposed and averaged, and below the size for which the
allocator asks the kernel for fresh pages each time; on an accelerator blocks only bound memory.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# The largest activation of each channel is brought to 2^49 .. 2^50: in float32 no sum of squared
# differences overflows, and no difference above 2^-112 of the largest activation squares to zero.
_TOP_EXPONENT = 50
_CPU_BLOCK = 2**19
_ACCELERATOR_BLOCK = 2**27


class NotFiniteError(ValueError):
    """Activations with NaN or infinite values, which cannot be clustered."""


class PixelFeatures:
    """Activations as one feature vector of length B for each of the C * H * W pixels.

    Args:
        activations: (B, C, H, W), floating point.

    Raises:
        NotFiniteError: If a channel has a value that is not finite.
    """

    def __init__(self, activations: Tensor) -> None:
        self.channels, self.height, self.width = activations.shape[1:]
        self.per_channel = self.height * self.width
        self._dtype = torch.promote_types(activations.dtype, torch.float32)
        self._flat = activations.reshape(len(activations), -1)
        self._scale = _power_of_two_scale(activations, self._dtype).repeat_interleave(
            self.per_channel
        )

    def _normalised(self, start: int, end: int) -> Tensor:
        """(B, end - start), the pixels from start to end."""
        return self._flat[:, start:end].to(self._dtype) * self._scale[start:end]

    def lattice_distances(self) -> tuple[Tensor, Tensor]:
        """Squared distances of each pixel to the next one in its row and in its column.

        Returns:
            right (C, H, W - 1) and down (C, H - 1, W).
        """
        batch, n_pixels = self._flat.shape
        step = max(self.width, _per_block(self._flat, batch))
        right, down = self._scale.new_empty(2, n_pixels)
        for start in range(0, n_pixels, step):
            block = self._normalised(start, start + step + self.width)
            for shift, out in ((1, right), (self.width, down)):
                # Differences across the end of a row or a channel come along and are left out.
                size = min(step, block.shape[1] - shift)
                if size > 0:
                    difference = block[:, shift : shift + size] - block[:, :size]
                    torch.sum(difference.square_(), 0, out=out[start : start + size])
        shape = self.channels, self.height, self.width
        return right.view(shape)[:, :, :-1], down.view(shape)[:, :-1]

    def averages(self, cluster: Tensor, total: int) -> Tensor:
        """(total, B), the mean over the pixels of each cluster.

        Args:
            cluster: (C*H*W,) int64, 0 .. total - 1, each at least once. Fast when the numbers
                ascend roughly with the pixels.
            total: Number of clusters.
        """
        batch, n_pixels = self._flat.shape
        order, first = _grouped(cluster, total)
        targets = torch.arange(0, n_pixels, _per_block(self._flat, batch), device=first.device)
        ends = first.new_tensor([total])
        bounds = torch.cat([torch.searchsorted(first, targets), ends]).unique_consecutive()
        positions = torch.cat([first, ends.new_tensor([n_pixels])])[bounds].tolist()
        means = self._scale.new_empty(total, batch)
        for clusters, members in zip(pairwise(bounds.tolist()), pairwise(positions), strict=True):
            pixels = order[slice(*members)]
            low, high = torch.stack(pixels.aminmax()).tolist()
            rows = self._normalised(low, high + 1).t().contiguous()
            offsets = first[slice(*clusters)] - members[0]
            means[slice(*clusters)] = F.embedding_bag(pixels - low, rows, offsets, mode="mean")
        return means


def averages(rows: Tensor, cluster: Tensor, total: int) -> Tensor:
    """(total, B), the unweighted mean of the rows of each cluster.

    The rows of a cluster are summed one after the other, on CUDA too, where adding to the means
    atomically would make the last bits depend on the timing.

    Args:
        rows: (n, B).
        cluster: (n,) int64, 0 .. total - 1, each at least once.
        total: Number of clusters.
    """
    order, first = _grouped(cluster, total)
    return F.embedding_bag(order, rows, first, mode="mean")


def distances(rows: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """(E,) squared Euclidean distances between rows[u] and rows[v].

    Args:
        rows: (n, B).
        u: (E,) int64.
        v: (E,) int64.
    """
    step = _per_block(rows, rows.shape[1])
    out = rows.new_empty(len(u))
    for start in range(0, len(u), step):
        edges = slice(start, start + step)
        difference = rows.index_select(0, u[edges]).sub_(rows.index_select(0, v[edges]))
        torch.sum(difference.square_(), 1, out=out[edges])
    return out


def _grouped(cluster: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Members sorted by cluster, (n,), and the position of the first of each cluster, (total,)."""
    size = torch.zeros(total, dtype=torch.int64, device=cluster.device)
    size.scatter_add_(0, cluster, torch.ones_like(cluster))
    return cluster.argsort(stable=True), size.cumsum(0) - size


def _per_block(like: Tensor, batch: int) -> int:
    """How many feature vectors of length batch go into one block on the device of `like`."""
    return max(1, (_CPU_BLOCK if like.device.type == "cpu" else _ACCELERATOR_BLOCK) // batch)


def _power_of_two_scale(activations: Tensor, dtype: torch.dtype) -> Tensor:
    """(C,) powers of two that bring the largest activation of each channel to 2^49 .. 2^50."""
    dims = (0, 2, 3)
    largest = torch.maximum(activations.amax(dims).abs(), activations.amin(dims).abs())
    # On the CPU in float64, where the power of two is exact.
    largest = largest.to("cpu").double()
    bad = (~largest.isfinite()).nonzero().squeeze(1).tolist()
    if bad:
        first = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise NotFiniteError(
            "activations must be finite; got NaN or Inf in "
            f"{len(bad)} of {len(largest)} channels: {first}"
        )
    exponent = _TOP_EXPONENT - torch.frexp(largest).exponent
    # A scale beyond the largest power of two of the dtype would be infinite.
    exponent = exponent.clamp(max=math.frexp(torch.finfo(dtype).max)[1] - 1)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return scale.to(device=activations.device, dtype=dtype)
