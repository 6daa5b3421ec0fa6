"""DropBlock against the cheapest thing it could be, against torchvision's and against timm's.

    python -m benchmarks.dropblock [--repeats N] [--quick] [--device cuda]

Speed: forward and backward in float32 at a rate of 0.1. The floor is ``x * mask`` with a mask that
is there already. torchvision and timm are called for the same kind of mask; torchvision has only
masks per channel.

Accuracy: the fraction of units that each of them zeroes at a nominal rate of 0.1.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropBlock2d as TimmDropBlock2d
from torch import Tensor
from torchvision.ops import drop_block2d as torchvision_drop_block

from benchmarks._settings import Settings
from benchmarks._text import milliseconds, ratio, table
from benchmarks._timing import compared, one_thread, paired
from timm_structdrop.layers import drop_block_2d

TITLE = "DropBlock"
RATE = 0.1
CASES = (((32, 1024, 14, 14), 7), ((32, 2048, 7, 7), 5))
QUICK_CASES = (((8, 64, 14, 14), 7),)
MAPS = ((14, 5), (14, 7), (7, 3), (7, 7))
OTHERS = ("timm", "torchvision")
# the floor, and ours, are some twenty times faster than the others
ROUNDS_WITHOUT_OTHERS = 5


def run(settings: Settings) -> list[dict[str, Any]]:
    """One row per shape and kind of mask, then one per map with the fractions dropped."""
    rounds = settings.rounds(7)
    with one_thread():
        speed = [
            speed_row(shape, block_size, coupled, rounds, settings.device)
            for shape, block_size in settings.pick(CASES, QUICK_CASES)
            for coupled in (False, True)
        ]
        n_maps = settings.pick(200_000, 10_000)
        return speed + [fractions_row(size, block, n_maps) for size, block in MAPS]


def speed_row(
    shape: tuple[int, int, int, int], block_size: int, coupled: bool, rounds: int, device: str
) -> dict[str, Any]:
    """Ours over the floor, and the others over ours."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=device, requires_grad=True)
    weights = torch.randn(shape, device=device)
    kept = torch.rand(shape[0], 1 if coupled else shape[1], *shape[2:], device=device) >= RATE
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
    times = paired(fast, ROUNDS_WITHOUT_OTHERS * rounds, device=device)
    slow_times = paired({"ours": fast["ours"], **others}, rounds, warm_up=1, device=device)
    return {
        "shape": shape,
        "block_size": block_size,
        "masks": "coupled" if coupled else "per channel",
        "over_floor": compared(times["ours"], times["floor"]),
        "over_ours": {name: compared(slow_times[name], slow_times["ours"]) for name in others},
    }


def fractions_row(size: int, block_size: int, n_maps: int) -> dict[str, Any]:
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
        error = float(per_map.std()) / math.sqrt(len(per_map))
        fractions[name] = {"mean": float(per_map.mean()), "standard_error": error}
    return {"map": size, "block_size": block_size, "n_maps": n_maps, "fractions": fractions}


def headline(rows: list[dict[str, Any]]) -> str:
    per_channel = [row for row in rows if row.get("masks") == "per channel"]
    coupled = [row for row in rows if row.get("masks") == "coupled"]
    shapes = " and ".join(f"{row['shape'][2]}x{row['shape'][3]}" for row in per_channel)
    return (
        f"DropBlock's forward and backward on {shapes} maps: {medians(per_channel)} of `x * mask` "
        f"with a mask per channel, {medians(coupled)} with one per image. Over ours: "
        f"torchvision {medians(per_channel, 'torchvision')} and timm "
        f"{medians(per_channel, 'timm')} with a mask per channel, timm {medians(coupled, 'timm')} "
        "with one per image."
    )


def medians(rows: list[dict[str, Any]], other: str | None = None) -> str:
    """The ratios of another to ours, of ours to the floor without one, by shape."""
    found = [row["over_ours"][other] if other else row["over_floor"] for row in rows]
    return " and ".join(f"{one['ratio']['median']:.{1 if other else 2}f}" for one in found)


def report(rows: list[dict[str, Any]]) -> list[str]:
    speed = [row for row in rows if "masks" in row]
    dropped = [row for row in rows if "fractions" in row]
    header = ["shape", "block", "masks", "`x * mask`", "ours / `x * mask`"]
    return [
        f"Forward and backward, rate {RATE}; {speed[0]['over_floor']['repeats']} rounds with "
        f"`x * mask`, {speed[0]['over_ours']['timm']['repeats']} with the others.",
        "",
        *table(
            header + [f"{name} / ours" for name in OTHERS],
            [
                [
                    str(tuple(row["shape"])),
                    str(row["block_size"]),
                    row["masks"],
                    milliseconds(row["over_floor"]["other_ms"]),
                    ratio(row["over_floor"]["ratio"]),
                    *(
                        ratio(row["over_ours"][name]["ratio"], 1)
                        if name in row["over_ours"]
                        else "-"
                        for name in OTHERS
                    ),
                ]
                for row in speed
            ],
        ),
        "",
        f"Fraction of units zeroed at a nominal rate of {RATE} on {dropped[0]['n_maps']:,} maps "
        "(standard error).",
        "",
        *table(
            ["map", "block", "ours", *OTHERS],
            [
                [
                    f"{row['map']}x{row['map']}",
                    str(row["block_size"]),
                    *(
                        f"{row['fractions'][name]['mean']:.4f} "
                        f"({row['fractions'][name]['standard_error']:.4f})"
                        for name in ("ours", *OTHERS)
                    ),
                ]
                for row in dropped
            ],
        ),
    ]


if __name__ == "__main__":
    from benchmarks._suite import alone

    alone("dropblock")
