"""ReNA of all channels at once against nilearn's, channel by channel.

    python -m benchmarks.rena [--repeats N]

Each repeat times both on the same activations, one after the other in one process on one thread,
and takes the ratio: what else the machine does then meets both. nilearn is called at its
innermost public function, with the activations as they are (float32), and on some of the
channels only, since it takes each channel the same time; the time is per channel.
"""

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import nibabel
import nilearn
import numpy as np
import torch
from nilearn.regions.rena_clustering import recursive_neighbor_agglomeration
from torch import Tensor
from torch.nn import functional as F

from benchmarks._timing import one_thread
from timm_structdrop.cluster import rena

BATCH = 64
CHANNELS = 64
CLUSTERS = 15
# Side of the maps: channels given to nilearn.
SIZES = {16: 16, 32: 12, 56: 8, 112: 4}
DEAD_SIZE, DEAD_CHANNELS = 16, 8


def conv_activations(size: int, seed: int = 0) -> Tensor:
    """(BATCH, CHANNELS, size, size): random 7x7 convolutions of smoothed noise, after ReLU."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, 3, size + 12, size + 12, generator=generator)
    images = F.avg_pool2d(F.avg_pool2d(images, 4, stride=1), 4, stride=1)
    kernels = torch.randn(CHANNELS, 3, 7, 7, generator=generator)
    return F.relu(F.conv2d(images, kernels))


def nilearn_rena(channel: Tensor) -> tuple[int, np.ndarray]:
    """Number of clusters and labels that nilearn finds in one channel, (B, H, W)."""
    mask = nibabel.Nifti1Image(np.ones((*channel.shape[1:], 1), dtype=np.int8), np.eye(4))
    samples = channel.flatten(1).numpy()
    return recursive_neighbor_agglomeration(samples, mask, CLUSTERS, n_iter=1000)


def within_cluster_variance(channel: Tensor, labels: Tensor) -> float:
    """Sum of the squared distances to the cluster means of one channel, (B, H, W)."""
    pixels = channel.flatten(1).T.double()
    member = F.one_hot(labels.flatten().long()).double()
    means = member.T @ pixels / member.sum(0)[:, None]
    return float((pixels - member @ means).square().sum())


def timed(function: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def run(repeats: int = 7) -> list[dict[str, Any]]:
    """Measure every case.

    Args:
        repeats: Paired measurements per case.

    Returns:
        One row per case: the median time per channel of both, the median, smallest and largest
        ratio, and the variance within our clusters over that within nilearn's.
    """
    with one_thread(), warnings.catch_warnings():
        # nilearn divides by zero on dead channels.
        warnings.simplefilter("ignore", RuntimeWarning)
        rows = [sizes_row(size, channels, repeats) for size, channels in SIZES.items()]
        rows.append(dead_row(repeats))
    if torch.cuda.is_available():
        rows += [cuda_row(size, repeats) for size in SIZES]
    return rows


def sizes_row(size: int, n_channels: int, repeats: int) -> dict[str, Any]:
    """A layer without dead channels."""
    activations = conv_activations(size)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(timed(lambda: rena(activations, CLUSTERS)) / CHANNELS)
        theirs.append(
            timed(lambda: [nilearn_rena(activations[:, c]) for c in range(n_channels)]) / n_channels
        )
    row = compared(f"{size}x{size}", ours, theirs)
    return row | {"nilearn_channels": n_channels, "variance_ratio": variance_ratio(activations)}


def variance_ratio(activations: Tensor) -> float:
    """Variance within our clusters over that within nilearn's, all channels together."""
    ours = theirs = 0.0
    for channel, labels in enumerate(rena(activations, CLUSTERS).labels):
        one = activations[:, channel]
        ours += within_cluster_variance(one, labels)
        theirs += within_cluster_variance(one, torch.from_numpy(nilearn_rena(one)[1]))
    return ours / theirs


def dead_row(repeats: int) -> dict[str, Any]:
    """A layer with dead channels, on which nilearn goes through all of its rounds."""
    activations = conv_activations(DEAD_SIZE)
    activations[:, :DEAD_CHANNELS] = 0
    n_alive = SIZES[DEAD_SIZE]
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(timed(lambda: rena(activations, CLUSTERS)) / CHANNELS)
        dead = timed(lambda: nilearn_rena(activations[:, 0]))
        alive = range(DEAD_CHANNELS, DEAD_CHANNELS + n_alive)
        each = timed(lambda alive=alive: [nilearn_rena(activations[:, c]) for c in alive]) / n_alive
        total = DEAD_CHANNELS * dead + (CHANNELS - DEAD_CHANNELS) * each
        theirs.append(total / CHANNELS)
    name = f"{DEAD_SIZE}x{DEAD_SIZE}, {DEAD_CHANNELS} of {CHANNELS} channels dead"
    return compared(name, ours, theirs) | {"nilearn_channels": 1 + n_alive}


def cuda_row(size: int, repeats: int) -> dict[str, Any]:
    """The same on a GPU against one CPU thread; synchronized before and after."""
    activations = conv_activations(size)
    on_gpu = activations.cuda()

    def gpu() -> None:
        rena(on_gpu, CLUSTERS)
        torch.cuda.synchronize()

    gpu()
    ours, cpu = [], []
    for _ in range(repeats):
        ours.append(timed(gpu) / CHANNELS)
        with one_thread():
            cpu.append(timed(lambda: rena(activations, CLUSTERS)) / CHANNELS)
    return compared(f"{size}x{size} on {torch.cuda.get_device_name()}", ours, cpu, "cpu")


def compared(
    case: str, ours: list[float], other: list[float], name: str = "nilearn"
) -> dict[str, Any]:
    """A row from paired times in milliseconds per channel."""
    ratios = [b / a for a, b in zip(ours, other, strict=True)]
    return {
        "benchmark": "rena",
        "case": case,
        "ms_per_channel": statistics.median(ours),
        f"{name}_ms_per_channel": statistics.median(other),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "repeats": len(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="paired measurements per case")
    rows = run(parser.parse_args().repeats)
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"nilearn {nilearn.__version__}; batch {BATCH}, {CHANNELS} channels, {CLUSTERS} clusters"
    )
    for row in rows:
        other = row.get("nilearn_ms_per_channel", row.get("cpu_ms_per_channel"))
        line = (
            f"{row['case']:34s} {row['ms_per_channel']:7.3f} ms/channel against {other:8.2f}: "
            f"{row['ratio']:6.1f} x ({row['ratio_min']:.1f} .. {row['ratio_max']:.1f}, "
            f"n = {row['repeats']})"
        )
        if "variance_ratio" in row:
            line += f", variance {row['variance_ratio']:.3f} of nilearn's"
        print(line)


if __name__ == "__main__":
    main()
