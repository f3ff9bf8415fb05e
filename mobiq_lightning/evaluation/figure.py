"""The plot of a comparison: perplexity against used bits, the router's curve on top of all others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mobiq_lightning.runs import CONTROLS, Allocation, MeanRow, Measured, label, summarize

_COLORS: dict[Allocation, str] = {"router": "#c8102e", "rtn": "#8c8c8c", "static": "#1f77b4", "layers": "#7b3fa0"}
_COLORS |= {"shuffled": "#c99700", "random": "#2ca02c"}
_MARKERS = {"rtn": "s", "router": "o", "static": "^", "layers": "D", "shuffled": "+", "random": "x"}
_EMPHASIS = {"linewidth": 2.6, "markersize": 7, "markeredgecolor": "white", "zorder": 6}
_OTHERS = {"linewidth": 1.1, "markersize": 5, "alpha": 0.85, "zorder": 3}
_ROOM = 0.12
"""Share of the axis above the highest point that it is chosen for."""
_WORTH = 1.6
"""The axis ends below points that would make it at least so many times as long."""


def plot(measured: Measured) -> Any:
    """Draws perplexity against used bits, one line per allocation.

    The axis reaches as high as full precision, the router and the best control of each budget need. What lies far above it, as
    rounding at 2 bits does, is an arrow with its value at the upper end. A perplexity that is not finite is left out.

    Returns:
        The matplotlib figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = summarize(row for row in measured.rows if row.finite)
    for full in (row for row in rows if row.allocation == "full"):
        axes.axhline(full.perplexity, color="black", linewidth=1, linestyle=":", label="full precision", zorder=2)
    for allocation, color in _COLORS.items():
        points = sorted((row.used_bits, row.perplexity, row.spread) for row in rows if row.allocation == allocation)
        if not points:
            continue
        bits, perplexity, spread = zip(*points, strict=True)
        how = _EMPHASIS if allocation == "router" else _OTHERS
        how = {**how, "linewidth": 0} if allocation == "rtn" else how
        axes.errorbar(
            bits,
            perplexity,
            yerr=spread,
            color=color,
            marker=_MARKERS[allocation],
            capsize=2,
            elinewidth=1,
            label=label(allocation, measured.deployable),
            **how,
        )
    axes.set_yscale("log")
    axes.set_xlabel("used code bits per weight")
    cut = _limit_axis(axes, rows)
    axes.set_ylabel(f"perplexity (log scale{'; ↑ beyond the axis, with its value' if cut else ''})")
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("{x:.4g}")
    axes.grid(True, which="both", alpha=0.25)
    lost = len(measured.rows) - sum(row.finite for row in measured.rows)
    said = f"\n{lost} of {len(measured.rows)} rows are not finite and left out" if lost else ""
    axes.set_title(f"{measured.heading}{said}", fontsize=10, parse_math=False)
    if rows:
        axes.legend()
    return figure


def _limit_axis(axes: Any, rows: Sequence[MeanRow]) -> bool:
    """Ends the axis where what it is about ends, and marks what lies above; returns whether something does."""
    values = [row.perplexity for row in rows]
    wanted = [row.perplexity for row in rows if row.allocation in ("full", "router")]
    for bits in {row.target_bits for row in rows}:
        controls = [row.perplexity for row in rows if row.allocation in CONTROLS and row.target_bits == bits]
        wanted += [min(controls)] if controls else []
    if not wanted or not any(row.allocation == "router" for row in rows):
        return False
    lowest, highest = min(values), max(wanted)
    top = highest * (highest / lowest) ** _ROOM
    if highest <= lowest or max(values) / lowest <= (top / lowest) ** _WORTH:
        return False
    axes.set_ylim(lowest * (highest / lowest) ** -0.06, top)
    places: Counter[float] = Counter()
    for row in (row for row in rows if row.perplexity > top):
        axes.annotate(
            f"↑ {row.perplexity:.4g}",
            xy=(row.used_bits, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, -4 - 10 * places[row.target_bits]),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=9,
            color=_COLORS[row.allocation],
            zorder=7,
        )
        places[row.target_bits] += 1
    return True
