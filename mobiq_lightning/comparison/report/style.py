"""Defines how charts of a report look: colours, panels, and their two forms, SVG inside the page and PNG beside it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobiq_lightning.comparison.report.runs import CurvePoint, Strategy
from mobiq_lightning.files import write_atomically

INK, GRID, GREY = "#24292f", "#d5dbe1", "#7d8590"
"""Ink and grid follow the page's scheme, light or dark; grey shows on both."""
_THEMED = {INK: "currentColor", GRID: "var(--grid)"}
_COLORS = ("#1f77b4", "#d9480f", "#2b9348", "#a855c7", "#c99700", "#0aa2a2", "#e0457b", "#8c5a3c")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_SHAPES = {
    "o": '<circle cx="14" cy="7" r="3.5"/>',
    ".": '<circle cx="14" cy="7" r="2.5"/>',
    "s": '<path d="M10.5 3.5h7v7h-7z"/>',
    "^": '<path d="M14 2.5l4.5 8h-9z"/>',
    "v": '<path d="M14 11.5l4.5-8h-9z"/>',
    "D": '<path d="M14 2.5l4.5 4.5-4.5 4.5-4.5-4.5z"/>',
    "P": '<path d="M12.4 2.5h3.2v2.9h2.9v3.2h-2.9v2.9h-3.2v-2.9h-2.9v-3.2h2.9z"/>',
    "X": '<path d="M11.8 2.6l2.2 2.2 2.2-2.2 2.2 2.2-2.2 2.2 2.2 2.2-2.2 2.2-2.2-2.2-2.2 2.2-2.2-2.2 2.2-2.2-2.2-2.2z"/>',
    "x": '<path d="M11 4l6 6m0-6l-6 6" stroke-width="1.5"/>',
    "*": '<path d="M14 2l1.5 3.6 3.9.3-3 2.5 1 3.8-3.4-2.1-3.4 2.1 1-3.8-3-2.5 3.9-.3z"/>',
    "#": '<path d="M5 2.5h18v9H5z"/>',
}
"""Markers of matplotlib, drawn in a box of 28 x 14."""
_STYLE = {
    "font.size": 9.0,
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
_FONTS = "DejaVu Sans, Verdana, sans-serif"  # fonts of the same widths first: nothing is laid out again
_PNG_COLUMNS = 3


@dataclass(frozen=True)
class KeyEntry:
    """An entry of a chart's key: what a colour, marker and line style stand for.

    Args:
        label: Text of the entry.
        color: Colour of the entry.
        marker: Marker as matplotlib names it, or ``#`` for a filled box without a line; empty for none.
        dashes: Lengths of strokes and gaps of the line; empty for a solid line.
    """

    label: str
    color: str
    marker: str = ""
    dashes: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes in a chart.

    Args:
        title: Text above the axes.
        draw: Function that draws into the axes.
        height: Height in inches, at a width of 4.4 inches.
    """

    title: str
    draw: Callable[[Any], None]
    height: float = 2.9


@dataclass(frozen=True)
class Chart:
    """A chart of the report: panels that belong together, with a heading, a caption and a key.

    Args:
        slug: Name of the chart's PNG file, without its ending.
        heading: Heading of the chart's section.
        caption: Text that explains what the chart shows and how to read it.
        panels: Panels, in order.
        key: Entries that explain colours and markers.
        wide: Whether panels need more room than usual on the page.
    """

    slug: str
    heading: str
    caption: str
    panels: Sequence[Panel]
    key: Sequence[KeyEntry] = field(default_factory=list)
    wide: bool = False


def color_of(strategy: Strategy) -> str:
    """The colour of a strategy in all charts, visible on white and on black."""
    return _COLORS[strategy.number % len(_COLORS)]


def marker_of(strategy: Strategy) -> str:
    """The marker of a strategy in all charts; with the colour it tells 56 strategies apart."""
    return _MARKERS[(strategy.number + strategy.number // len(_COLORS)) % len(_MARKERS)]


def depth_color(depth: int) -> str:
    """The colour of a depth in bits: from light green at few bits to indigo at eight, small depths being far apart."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    position = min(max((math.log2(depth) - 0.6) / 2.4, 0.0), 1.0)
    return str(to_hex(colormaps["viridis_r"](0.1 + 0.65 * position)))


def key_of(strategies: Sequence[Strategy]) -> list[KeyEntry]:
    """The entries of a chart's key for strategies, with their colours and markers."""
    return [KeyEntry(s.name, color_of(s), marker_of(s)) for s in strategies]


def plain(text: str) -> str:
    """A text as a chart shows it as it is: matplotlib would read what stands between two dollar signs as a formula."""
    return text.replace("\\", "\\\\").replace("$", r"\$") if "$" in text else text


def draw_curve(axes: Any, points: Sequence[CurvePoint], strategy: Strategy, shift: float = 0.0) -> None:
    """Draws a strategy's curve with error bars into axes, moved sideways by `shift` so that bars do not overlap."""
    axes.errorbar(
        [point.x + shift for point in points],
        [point.mean for point in points],
        yerr=[point.spread for point in points],
        color=color_of(strategy),
        marker=marker_of(strategy),
        markersize=4.5,
        linewidth=1.3,
        elinewidth=0.8,
        capsize=2,
    )


def scale_log(axes: Any) -> None:
    """Makes the y axis logarithmic; where it spans less than a factor of 4, ticks are plain numbers in even steps."""
    from matplotlib.ticker import NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 4:
        rough = (high - low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        axes.set_yticks([step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)])
        axes.yaxis.set_major_formatter("{x:.4g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def as_svg(panel: Panel, name: str) -> str:
    """Draws a panel as an ``svg`` element whose ink follows the colour of the text around it.

    Args:
        panel: The panel.
        name: Name that no other panel of the page has, since identifiers are made from it.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    text = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.4, panel.height), layout="constrained")
        FigureCanvasSVG(figure)
        panel.draw(figure.subplots())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _for_page(text.getvalue(), panel.title)


def _for_page(svg: str, title: str) -> str:
    """The ``svg`` element without what only a separate file needs, and with the page's colours."""
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would apply to the whole page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{escape(title)}"', svg, count=1)
    for color, themed in _THEMED.items():
        svg = svg.replace(color, themed)
    return svg.replace("'DejaVu Sans'", _FONTS)


def write_png(chart: Chart, folder: Path, title: str) -> None:
    """Draws all panels of a chart into ``<slug>.png``, with the comparison's title above and the key below them."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = folder / f"{chart.slug}.png"
    columns = min(_PNG_COLUMNS if len(chart.panels) != 4 else 2, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    with rc_context(_STYLE):
        size = (4.4 * columns, 0.7 + (chart.panels[0].height + 0.3) * rows + 0.3 * bool(chart.key))
        figure = Figure(figsize=size, dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, panel in zip(grid, chart.panels, strict=False):
            axes.set_title(panel.title, fontsize=10)
            panel.draw(axes)
        for axes in grid[len(chart.panels) :]:
            axes.set_axis_off()
        figure.suptitle(plain(f"{title}: {chart.heading}"), fontsize=12)
        if chart.key:
            longest = max(len(entry.label) for entry in chart.key)
            fitting = max(1, int(size[0] / (0.6 + 0.085 * longest)))  # inches: mark and gap, and letters
            handles = [_handle(entry) for entry in chart.key]
            figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), fitting), frameon=False)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _handle(entry: KeyEntry) -> Any:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if entry.marker == "#":
        return Patch(color=entry.color, label=entry.label)
    style = (0, tuple(float(d) for d in entry.dashes.split())) if entry.dashes else "-"
    return Line2D([], [], color=entry.color, marker=entry.marker or None, linestyle=style, label=entry.label)


def key_marks(key: Sequence[KeyEntry]) -> list[tuple[KeyEntry, str]]:
    """The entries of a key, each with its line and marker as a small ``svg`` element."""
    return [(entry, _mark(entry)) for entry in key]


def _mark(entry: KeyEntry) -> str:
    color = _THEMED.get(entry.color, entry.color)
    line = f'<path d="M1 7h26" stroke-dasharray="{entry.dashes}" stroke-width="1.5"/>' if entry.marker != "#" else ""
    return (
        f'<svg viewBox="0 0 28 14" width="28" height="14" aria-hidden="true" fill="{color}" stroke="{color}" '
        f'stroke-width="0">{line}{_SHAPES.get(entry.marker, "")}</svg>'
    )
