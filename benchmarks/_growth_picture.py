"""The picture of the growth benchmark."""

from typing import Any

from timm_structdrop.analysis.figure import new_figure

__all__ = ["draw_growth"]

STYLES = (("#0b6e4f", "o"), ("#b2182b", "s"), ("#2166ac", "^"), ("#777777", "."))
LABELS = {
    "pixels": "pixels of a map (H x W)",
    "channels": "channels",
    "images": "images in the batch",
    "clusters": "clusters per channel",
}


def draw_growth(rows: list[dict[str, Any]]) -> Any:
    """One panel per size that moves, times over it, both axes logarithmic."""
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
