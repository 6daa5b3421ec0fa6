"""How times grow with the pixels, channels and images of the activations, and with the clusters.

    python -m benchmarks.growth [--repeats N] [--quick] [--device cuda]

Forward and backward of DropCluster, of DropBlock and of a product with a mask that is there, which
is what memory alone does; and a fit of DropCluster's clusters. One size moves, the others stay; the
sizes of a curve take turns. A slope of 1 on the two logarithmic axes is growth in proportion.
"""

from collections.abc import Callable
from functools import partial
from math import isqrt, log
from statistics import linear_regression
from typing import Any

import torch
from torch import Tensor

from benchmarks._models import conv_activations
from benchmarks._settings import Settings
from benchmarks._text import milliseconds, table
from benchmarks._timing import one_thread, paired, spread
from timm_structdrop.analysis.figure import new_figure
from timm_structdrop.layers import DropBlock2d, DropCluster2d

TITLE = "Growth"
FIT, CLUSTER, BLOCK = "DropCluster, a fit", "DropCluster, a step", "DropBlock, a step"
FLOOR = "x * mask, a step"
HAVE_CLUSTERS = (FIT, CLUSTER)
BASE = {"pixels": 32 * 32, "channels": 32, "images": 32, "clusters": 15}
AXES = {
    "pixels": (8**2, 16**2, 32**2, 64**2, 128**2),
    "channels": (8, 16, 32, 64, 128, 256, 512),
    "images": (8, 16, 32, 64, 128, 256, 512),
    "clusters": (2, 4, 8, 16, 32, 64, 128, 256),
}
BLOCK_SIZE = 7
STYLES = (("#0b6e4f", "o"), ("#b2182b", "s"), ("#2166ac", "^"), ("#777777", "."))
LABELS = {
    "pixels": "pixels of a map (H x W)",
    "channels": "channels",
    "images": "images in the batch",
    "clusters": "clusters per channel",
}


def run(settings: Settings) -> list[dict[str, Any]]:
    """One row per curve: what is timed, along which size, the times and the slopes."""
    with one_thread():
        return [row for axis in AXES for row in axis_rows(axis, settings)]


def axis_rows(axis: str, settings: Settings) -> list[dict[str, Any]]:
    values = settings.pick(AXES[axis], AXES[axis][:3])
    functions: dict[tuple[str, int], Callable[[], object]] = {}
    for value in values:
        for what, function in timed({**BASE, axis: value}, settings.device).items():
            if axis != "clusters" or what in HAVE_CLUSTERS:
                functions[what, value] = function
    names = {f"{what} {value}": function for (what, value), function in functions.items()}
    times = paired(names, settings.rounds(7), warm_up=1, device=settings.device)
    rows = []
    for what in (FIT, CLUSTER, BLOCK, FLOOR):
        found = {v: spread(times[f"{what} {v}"].elapsed) for w, v in functions if w == what}
        if found:
            medians = [times_of["median"] for times_of in found.values()]
            rows.append(
                {
                    "axis": axis,
                    "what": what,
                    "values": list(found),
                    "ms": list(found.values()),
                    "slope": slope(list(found), medians),
                    "last_slope": slope(list(found)[-2:], medians[-2:]),
                    "base": BASE,
                    "repeats": settings.rounds(7),
                }
            )
    return rows


def timed(sizes: dict[str, int], device: str) -> dict[str, Callable[[], object]]:
    """The functions to time on activations of these sizes."""
    side = isqrt(sizes["pixels"])
    shape = (sizes["images"], sizes["channels"], side, side)
    x = conv_activations(shape).to(device)
    cluster = DropCluster2d(sizes["channels"], (side, side), n_clusters=sizes["clusters"])
    cluster = cluster.to(device).train()
    cluster.fit(x)
    leaf, weights = x.clone().requires_grad_(), torch.ones_like(x)
    mask = torch.ones_like(x[:1])
    return {
        FIT: partial(cluster.fit, x),
        CLUSTER: partial(forward_and_backward, cluster, leaf, weights),
        BLOCK: partial(forward_and_backward, DropBlock2d(0.1, BLOCK_SIZE).train(), leaf, weights),
        FLOOR: partial(forward_and_backward, mask.mul, leaf, weights),
    }


def forward_and_backward(drop: Callable[[Tensor], Tensor], x: Tensor, weights: Tensor) -> None:
    x.grad = None
    drop(x).backward(weights)


def slope(values: list[int], times: list[float]) -> float:
    """Of the least squares line through the logarithms."""
    return linear_regression(list(map(log, values)), list(map(log, times))).slope


def headline(rows: list[dict[str, Any]]) -> str:
    steepest = max((r for r in rows if r["what"] != FLOOR), key=lambda row: row["last_slope"])
    floors = [r for r in rows if r["what"] == FLOOR and r["axis"] == steepest["axis"]]
    alone = "".join(
        f"; `x * mask` alone {r['slope']:.2f} and {r['last_slope']:.2f}" for r in floors
    )
    return (
        "Steepest growth, slope on logarithmic axes (1 is in proportion): "
        f"{steepest['what']} along {steepest['axis']}, {steepest['slope']:.2f} over all and "
        f"{steepest['last_slope']:.2f} at the large end{alone}."
    )


def report(rows: list[dict[str, Any]]) -> list[str]:
    base = rows[0]["base"]
    side = isqrt(base["pixels"])
    return [
        f"Beside the size that moves: {base['images']} images, {base['channels']} channels, "
        f"{side}x{side} pixels, {base['clusters']} clusters, blocks of {BLOCK_SIZE}. A step is "
        f"forward and backward. Medians of {rows[0]['repeats']} rounds; the slope of all points, "
        "and that of the last two.",
        "",
        *table(
            ["along", "what", "from", "to", "slope", "at the end"],
            [
                [
                    row["axis"],
                    row["what"],
                    f"{milliseconds(row['ms'][0])} at {row['values'][0]}",
                    f"{milliseconds(row['ms'][-1])} at {row['values'][-1]}",
                    f"{row['slope']:.2f}",
                    f"{row['last_slope']:.2f}",
                ]
                for row in rows
            ],
        ),
    ]


def draw(rows: list[dict[str, Any]]) -> Any:
    """One panel per size that moves, times over it, both axes logarithmic; a matplotlib figure."""
    figure = new_figure(9.0, 6.6)
    axes = [row["axis"] for row in rows]
    panels = figure.subplots(2, 2, sharey=True)
    styles = dict(zip(dict.fromkeys(row["what"] for row in rows), STYLES, strict=False))
    for panel, name in zip(panels.flatten(), dict.fromkeys(axes), strict=True):
        chosen = [row for row in rows if row["axis"] == name]
        curves = [_draw_curve(panel, row, *styles[row["what"]]) for row in chosen]
        panel.legend(
            curves, [f"{row['slope']:.2f}" for row in chosen], title="slopes", loc="upper left",
            ncols=2, fontsize=8, title_fontsize=8, frameon=False, columnspacing=1.2,
        )  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel=LABELS[name])
        values = chosen[0]["values"]
        panel.set_xticks(values, [f"{value:,}" for value in values], fontsize=8)
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    for panel in panels[:, 0]:
        panel.set_ylabel("milliseconds")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper center", ncols=4, frameon=False, bbox_to_anchor=(0.5, 0.935)
    )
    fixed = ", ".join(f"{count:,} {name}" for name, count in rows[0]["base"].items())
    figure.suptitle(
        "Time of a fit and of a step; a slope of 1 is growth in proportion\n"
        f"(what does not move: {fixed})",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    return figure


def _draw_curve(panel: Any, row: dict[str, Any], colour: str, marker: str) -> Any:
    medians = [found["median"] for found in row["ms"]]
    (curve,) = panel.plot(
        row["values"], medians, color=colour, marker=marker, markersize=5, label=row["what"]
    )
    low, high = ([found[name] for found in row["ms"]] for name in ("low", "high"))
    panel.fill_between(row["values"], low, high, color=colour, alpha=0.2, linewidth=0)
    return curve


if __name__ == "__main__":
    from benchmarks._suite import alone

    alone("growth")
