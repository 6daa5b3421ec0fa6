"""ReNA of all channels at once against nilearn's, channel by channel.

    python -m benchmarks.rena [--repeats N] [--quick] [--device cuda]

nilearn is called at its innermost public function, with the activations as they are (float32), and
on some of the channels only, since it takes each channel the same time; the time is per channel.
On a GPU ours is compared with ours on one CPU thread.
"""

import warnings
from typing import Any

import nibabel
import numpy as np
import torch
from nilearn.regions.rena_clustering import recursive_neighbor_agglomeration
from torch import Tensor
from torch.nn import functional as F

from benchmarks._models import conv_activations
from benchmarks._settings import Settings
from benchmarks._text import milliseconds, ratio, table
from benchmarks._timing import compared, one_thread, paired, weighted
from timm_structdrop.cluster import rena

TITLE = "ReNA"
BATCH = 64
CHANNELS = 64
CLUSTERS = 15
# Side of the maps: channels given to nilearn.
SIZES = {16: 16, 32: 12, 56: 8, 112: 4}
QUICK_SIZES = {16: 4, 32: 2}
DEAD_SIZE, DEAD_CHANNELS = 16, 8


def nilearn_rena(channel: Tensor) -> tuple[int, np.ndarray]:
    """Number of clusters and labels that nilearn finds in one channel, (B, H, W)."""
    mask = nibabel.Nifti1Image(np.ones((*channel.shape[1:], 1), dtype=np.int8), np.eye(4))
    samples = channel.flatten(1).numpy()
    return recursive_neighbor_agglomeration(samples, mask, CLUSTERS, n_iter=1000)


def run(settings: Settings) -> list[dict[str, Any]]:
    """One row per size of the maps, and one of a layer with dead channels."""
    sizes, rounds = settings.pick(SIZES, QUICK_SIZES), settings.rounds(7)
    with one_thread(), warnings.catch_warnings():
        # nilearn divides by zero on dead channels.
        warnings.simplefilter("ignore", RuntimeWarning)
        if settings.device == "cuda":
            return [cuda_row(size, rounds) for size in sizes]
        rows = [sizes_row(size, channels, rounds) for size, channels in sizes.items()]
        return [*rows, dead_row(sizes[DEAD_SIZE], rounds)]


def activations_of(size: int) -> Tensor:
    return conv_activations((BATCH, CHANNELS, size, size))


def sizes_row(size: int, n_channels: int, rounds: int) -> dict[str, Any]:
    """A layer without dead channels."""
    activations = activations_of(size)
    times = paired(
        {
            "ours": lambda: rena(activations, CLUSTERS),
            "nilearn": lambda: [nilearn_rena(activations[:, c]) for c in range(n_channels)],
        },
        rounds,
        warm_up=1,
    )
    return {
        "case": f"{size}x{size}",
        "nilearn_channels": n_channels,
        "variance_ratio": variance_ratio(activations),
        **compared(weighted((CHANNELS / n_channels, times["nilearn"])), times["ours"]),
    }


def variance_ratio(activations: Tensor) -> float:
    """Variance within our clusters over that within nilearn's, all channels together."""
    ours = theirs = 0.0
    for channel, labels in enumerate(rena(activations, CLUSTERS).labels):
        one = activations[:, channel]
        ours += within_cluster_variance(one, labels)
        theirs += within_cluster_variance(one, torch.from_numpy(nilearn_rena(one)[1]))
    return ours / theirs


def within_cluster_variance(channel: Tensor, labels: Tensor) -> float:
    """Sum of the squared distances to the cluster means of one channel, (B, H, W)."""
    pixels = channel.flatten(1).T.double()
    member = F.one_hot(labels.flatten().long()).double()
    means = member.T @ pixels / member.sum(0)[:, None]
    return float((pixels - member @ means).square().sum())


def dead_row(n_alive: int, rounds: int) -> dict[str, Any]:
    """A layer with dead channels, on which nilearn goes through all of its rounds."""
    activations = activations_of(DEAD_SIZE)
    activations[:, :DEAD_CHANNELS] = 0
    alive = range(DEAD_CHANNELS, DEAD_CHANNELS + n_alive)
    times = paired(
        {
            "ours": lambda: rena(activations, CLUSTERS),
            "dead": lambda: nilearn_rena(activations[:, 0]),
            "alive": lambda: [nilearn_rena(activations[:, c]) for c in alive],
        },
        rounds,
        warm_up=1,
    )
    each_alive = (CHANNELS - DEAD_CHANNELS) / n_alive
    nilearn = weighted((DEAD_CHANNELS, times["dead"]), (each_alive, times["alive"]))
    return {
        "case": f"{DEAD_SIZE}x{DEAD_SIZE}, {DEAD_CHANNELS} of {CHANNELS} channels dead",
        "nilearn_channels": 1 + n_alive,
        **compared(nilearn, times["ours"]),
    }


def cuda_row(size: int, rounds: int) -> dict[str, Any]:
    """On a GPU against one CPU thread."""
    activations = activations_of(size)
    on_gpu = activations.cuda()
    functions = {
        "cpu": lambda: rena(activations, CLUSTERS),
        "gpu": lambda: rena(on_gpu, CLUSTERS),
    }
    times = paired(functions, rounds, device="cuda")
    return {"case": f"{size}x{size}", **compared(times["cpu"], times["gpu"])}


def other_name(rows: list[dict[str, Any]]) -> str:
    return "nilearn" if "nilearn_channels" in rows[0] else "one CPU thread"


def headline(rows: list[dict[str, Any]]) -> str:
    ratios = "; ".join(f"{row['ratio']['median']:.1f} at {row['case']}" for row in rows)
    return f"ReNA of all channels, {other_name(rows)} over ours: {ratios}."


def report(rows: list[dict[str, Any]]) -> list[str]:
    name = other_name(rows)
    return [
        f"Batch {BATCH}, {CHANNELS} channels, {CLUSTERS} clusters; {rows[0]['repeats']} rounds. "
        "The variance is that within our clusters over that within nilearn's.",
        "",
        *table(
            ["maps", "ours, all channels", f"{name} / ours", "processor time", "variance"],
            [
                [
                    row["case"],
                    milliseconds(row["other_ms"]),
                    ratio(row["ratio"], 1),
                    f"{row['processor_ratio']:.1f}",
                    f"{row['variance_ratio']:.3f}" if "variance_ratio" in row else "-",
                ]
                for row in rows
            ],
        ),
    ]


if __name__ == "__main__":
    from benchmarks._suite import alone

    alone("rena")
