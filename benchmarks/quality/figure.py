"""The plot: perplexity against bits, a panel per group size; peers as points, our one checkpoint as a curve."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .rows import FULL

_MARKERS = "os^vDP<>XhpdH*8"
_OURS = "#c8102e"


def plot(found: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = sorted({row["group_size"] for row in found["means"]})
    figure = Figure(figsize=(4.2 * len(groups) + 2.6, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for panel, group_size in zip(panels, groups, strict=True):
        draw(panel, found, group_size)
    panels[0].set_ylabel("perplexity")
    handles: dict[str, Any] = {}
    for panel in panels:
        handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(f"{found['model']}: calibrated for one precision each, beside one checkpoint for all", fontsize=11)
    figure.savefig(path, dpi=130, format="png")


def draw(panel: Any, found: dict[str, Any], group_size: int) -> None:
    import matplotlib

    names = list(dict.fromkeys(row["peer"] for row in found["means"]))
    colors = matplotlib.colormaps["tab20"]
    for number, name in enumerate(names):
        points = [r for r in found["means"] if (r["peer"], r["group_size"]) == (name, group_size)]
        points = [r for r in points if math.isfinite(r["perplexity"])]
        # Points of a precision side by side, so that none hides another.
        shift = 0.36 * (number / max(1, len(names) - 1) - 0.5)
        panel.scatter(
            [r["bits"] + shift for r in points], [r["perplexity"] for r in points], s=26, label=name,
            marker=_MARKERS[number % len(_MARKERS)], color=colors(number % 20), alpha=0.9, zorder=2,
        )  # fmt: skip
    ours = [row for row in found["elastic"] if row["group_size"] == group_size]
    if ours:
        panel.plot(
            [r["used_bits"] for r in ours], [r["perplexity"] for r in ours], "-o", color=_OURS, markersize=4,
            label="elastic, one checkpoint", zorder=3,
        )  # fmt: skip
    panel.axhline(found[FULL], color="#8c8c8c", linestyle=":", label="full precision", zorder=1)
    panel.set_yscale("log")
    panel.set_title(f"group {group_size}", fontsize=10)
    panel.set_xlabel("bits per weight, scales and zeros left out")
    ticks = [t for t in (20, 25, 30, 40, 50, 70, 100, 150, 200, 300, 500, 1000) if t > 0.9 * found[FULL]]
    panel.set_yticks(ticks, [str(t) for t in ticks])
    panel.minorticks_off()
    panel.set_ylim(0.97 * found[FULL], None)
    panel.grid(alpha=0.25)
