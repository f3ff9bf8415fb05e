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
    panels = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    for panel, group_size in zip(panels, groups, strict=True):
        draw(panel, found, group_size)
    limits = [row["perplexity"] for row in (*found["means"], *found["elastic"]) if math.isfinite(row["perplexity"])]
    highest = max(limits) / found[FULL] - 1
    lowest = min(value / found[FULL] - 1 for value in limits)
    panels[0].set_ylim(found[FULL] * (1 + max(lowest, 0.0005) * 0.8), found[FULL] * (1 + max(highest, 0.1) * 1.3))
    panels[0].set_ylabel(f"perplexity, and above full precision ({found[FULL]:.2f})")
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
    panel.set_title(f"group {group_size}", fontsize=10)
    panel.set_xlabel("bits per weight, scales and zeros left out")
    scale(panel, found[FULL])
    panel.grid(alpha=0.25)


def scale(panel: Any, full: float) -> None:
    """Logarithm of the distance from full precision: at four bits all peers are within percents of it."""
    import numpy as np

    panel.set_yscale(
        "function", functions=(lambda y: np.log(np.maximum(y / full - 1, 1e-4)), lambda z: full * (1 + np.exp(z)))
    )
    excess = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
    panel.set_yticks(
        [full * (1 + e) for e in excess], [f"{full * (1 + e):.4g}\n+{100 * e:g} %" for e in excess], fontsize=7
    )
    panel.minorticks_off()
