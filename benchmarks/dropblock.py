"""DropBlock against the cheapest thing it could be, against torchvision's and against timm's.

    python -m benchmarks.dropblock [--repeats N]

Speed: forward and backward in float32 at a rate of 0.1, all in one process on one thread. The
functions take turns, and a ratio is taken within a turn, so that what else the machine does meets
both. The floor is ``x * mask`` with a mask that is there already. torchvision and timm are called
for the same kind of mask; torchvision has only masks per channel.

Accuracy: the fraction of units that each of them zeroes at a nominal rate of 0.1.
"""

import argparse
import math
import platform
from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from timm.layers.drop import DropBlock2d as TimmDropBlock2d
from torch import Tensor
from torchvision.ops import drop_block2d as torchvision_drop_block

from benchmarks._timing import one_thread, paired, spread
from timm_structdrop.layers import drop_block_2d

RATE = 0.1
CASES = (((32, 1024, 14, 14), 7), ((32, 2048, 7, 7), 5))
MAPS = ((14, 5), (14, 7), (7, 3), (7, 7))
# the floor, and ours, are some twenty times faster than the others
ROUNDS_WITHOUT_OTHERS = 5


def run(repeats: int = 7) -> list[dict[str, Any]]:
    """Measure every case.

    Args:
        repeats: rounds with all functions; there are five times as many with ours and the floor
            only.

    Returns:
        One row per case: milliseconds, and median and quartiles of the ratios.
    """
    with one_thread():
        return [
            speed_row(shape, block_size, coupled, repeats)
            for shape, block_size in CASES
            for coupled in (False, True)
        ]


def speed_row(
    shape: tuple[int, int, int, int], block_size: int, coupled: bool, repeats: int
) -> dict[str, Any]:
    """Ours against the floor, and the others against ours."""
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    weights = torch.randn(shape)
    kept = torch.rand(shape[0], 1 if coupled else shape[1], *shape[2:]) >= RATE
    mask = kept / (1 - RATE)

    def step(drop: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def forward_and_backward() -> None:
            x.grad = None
            drop(x).backward(weights)

        return forward_and_backward

    fast = {
        "floor": step(lambda x: x * mask),
        "ours": step(lambda x: drop_block_2d(x, RATE, block_size, couple_channels=coupled)),
    }
    timm_layer = TimmDropBlock2d(RATE, block_size, couple_channels=coupled).train()
    others = {"timm": step(timm_layer)}
    if not coupled:
        others["torchvision"] = step(lambda x: torchvision_drop_block(x, RATE, block_size))
    times = paired(fast, ROUNDS_WITHOUT_OTHERS * repeats)
    slow_times = paired({"ours": fast["ours"], **others}, repeats, warm_up=1)
    row: dict[str, Any] = {
        "shape": shape,
        "block_size": block_size,
        "masks": "coupled" if coupled else "per channel",
        "floor_ms": sorted(times["floor"])[len(times["floor"]) // 2],
        "ours_over_floor": spread(times["ours"], times["floor"]),
    }
    for name in others:
        row[f"{name}_over_ours"] = spread(slow_times[name], slow_times["ours"])
    return row


def dropped_fractions(
    size: int, block_size: int, n_maps: int = 200_000
) -> dict[str, tuple[float, float]]:
    """Fraction of units zeroed, and its standard error, on ``n_maps`` maps of ones."""
    torch.manual_seed(0)
    x = torch.ones(n_maps // 1000, 1000, size, size)
    timm_layer = TimmDropBlock2d(RATE, block_size, couple_channels=False).train()
    drops: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda x: drop_block_2d(x, RATE, block_size),
        "timm": timm_layer,
        "torchvision": lambda x: torchvision_drop_block(x, RATE, block_size),
    }
    fractions = {}
    for name, drop in drops.items():
        per_map = (drop(x) == 0).float().mean(dim=(2, 3)).flatten()
        fractions[name] = (float(per_map.mean()), float(per_map.std()) / math.sqrt(len(per_map)))
    return fractions


def text(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="DropBlock: speed and fraction dropped.")
    parser.add_argument("--repeats", type=int, default=7, help="rounds with all functions")
    repeats = parser.parse_args().repeats
    print(
        f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, timm {timm.__version__}; median (quartiles)"
    )
    print("shape; block; masks; floor ms; ours / floor; timm / ours; torchvision / ours")
    for row in run(repeats):
        others = [row.get(f"{name}_over_ours") for name in ("timm", "torchvision")]
        print(
            f"{row['shape']}; {row['block_size']}; {row['masks']}; {row['floor_ms']:.1f}; "
            f"{text(row['ours_over_floor'])}; " + "; ".join(text(r) if r else "-" for r in others)
        )
    print(f"fraction zeroed at a nominal rate of {RATE} (standard error)")
    print("map; block; ours; timm; torchvision")
    for size, block_size in MAPS:
        fractions = dropped_fractions(size, block_size)
        print(
            f"{size}x{size}; {block_size}; "
            + "; ".join(f"{mean:.4f} ({error:.4f})" for mean, error in fractions.values())
        )


if __name__ == "__main__":
    main()
