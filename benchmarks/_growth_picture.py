"""The picture of the growth benchmark."""

from typing import Any

from timm_structdrop.analysis.hopkins_figures import new_figure

__all__ = ["draw_growth"]

STYLES = (("#0b6e4f", "o"), ("#b2182b", "s"), ("#2166ac", "^"))
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
    styles = dict(zip(dict.fromkeys(row["what"] for row in rows), STYLES, strict=True))
    for panel, name in zip(panels.flatten(), dict.fromkeys(axes), strict=True):
        chosen = [row for row in rows if row["axis"] == name]
        for row in chosen:
            _draw_curve(panel, row, *styles[row["what"]])
        panel.set(xscale="log", yscale="log", xlabel=LABELS[name])
        values = chosen[0]["values"]
        panel.set_xticks(values, [f"{value:,}" for value in values], fontsize=8)
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
        panel.set_xlim(values[0] / 1.3, values[-1] * (values[-1] / values[0]) ** 0.14)
    for panel in panels[:, 0]:
        panel.set_ylabel("milliseconds")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper center", ncols=3, frameon=False, bbox_to_anchor=(0.5, 0.95)
    )
    figure.suptitle(
        "Time of a fit and of a step; the number at a curve is its slope (1: in proportion)",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    return figure


def _draw_curve(panel: Any, row: dict[str, Any], colour: str, marker: str) -> None:
    medians = [found["median"] for found in row["ms"]]
    panel.plot(row["values"], medians, color=colour, marker=marker, markersize=5, label=row["what"])
    low, high = ([found[name] for found in row["ms"]] for name in ("low", "high"))
    panel.fill_between(row["values"], low, high, color=colour, alpha=0.2, linewidth=0)
    panel.annotate(
        f"{row['slope']:.2f}", (row["values"][-1], medians[-1]), color=colour, fontsize=9,
        xytext=(5, 0), textcoords="offset points", va="center",
    )  # fmt: skip
