"""Perplexity of one elastic checkpoint against bits, beside peers that are calibrated for one precision each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

STYLES = {
    "RTN": ("rounding to nearest", "X", "#8a8a8a"),
    "HQQ": ("HQQ", "P", "#9467bd"),
    "GPTQ, group aware": ("GPTQ", "s", "#1f77b4"),
    "GPTAQ, clipped": ("GPTAQ, clipped", "<", "#0b7285"),
    "GPTAQ (quark)": ("GPTAQ (Quark)", "v", "#17a2b8"),
    "Qronos (quark)": ("Qronos", "D", "#e08a00"),
    "AutoRound, bfloat16": ("AutoRound", "^", "#2ca02c"),
}
"""Peers by their name in the rows, each with its name, marker and colour in the figure."""
OURS = "#c8102e"
LARGEST = 30.0
"""Times full precision, above which a point is left out: rounding at 2 bits is of the order of 10,000."""


def plot(found: dict[str, Any], name: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    full = next(row["perplexity"] for row in found["run"]["rows"] if row["allocation"] == "full")
    peers = [row for row in found["peers"]["means"] if math.isfinite(row["perplexity"])]
    left_out = [row for row in peers if row["perplexity"] > LARGEST * full]
    for peer, (label, marker, color) in STYLES.items():
        points = [row for row in peers if row["peer"] == peer and row not in left_out]
        if not points:  # not run, or left out
            continue
        face = color if marker in "XP" else "none"  # points of one precision may lie upon each other
        axes.scatter(
            [row["bits"] for row in points], [row["perplexity"] for row in points],
            marker=marker, facecolors=face, edgecolors=color, s=42, label=f"{label}, one model per bit-width", zorder=3,
        )  # fmt: skip
    router = sorted((r["used_bits"], r["perplexity"]) for r in found["run"]["rows"] if r["allocation"] == "router")
    axes.plot(*zip(*router, strict=True), "-o", color=OURS, markersize=4, label="elastic, one checkpoint", zorder=4)
    axes.axhline(full, color="black", linewidth=0.8, linestyle="--", label=f"full precision, {full:.2f}")
    axes.set_yscale("log")
    shown = [row["perplexity"] for row in peers if row not in left_out] + [value for _, value in router]
    ticks = [t for t in (20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500, 800) if t < 1.1 * max(shown)]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0.95 * full, 1.2 * max(shown))
    axes.set_xlabel("bits read per weight, mean over tokens (scales and zero points left out)")
    axes.set_ylabel("perplexity, lower is better")
    missing = ", ".join(f"{STYLES[r['peer']][0]} at {r['bits']}: {r['perplexity']:,.0f}" for r in left_out)
    axes.set_title(f"{name}, WikiText-2, groups of 64" + (f"\n(not shown: {missing})" if missing else ""), fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130, format="png", metadata={"Software": None})
