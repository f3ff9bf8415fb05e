"""Draws charts of perplexity and KL against used bits: every allocation, and differences too small to see there."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from mobiq_lightning.comparison.report.input import ReportInput
from mobiq_lightning.comparison.report.runs import CurvePoint, Strategy, against, curve
from mobiq_lightning.comparison.report.style import GREY, INK, Chart, KeyEntry, Panel, draw_curve, key_of, scale_log
from mobiq_lightning.comparison.report.tables import columns_of
from mobiq_lightning.comparison.table import at_bits
from mobiq_lightning.runs import SHORT, Control, Metric, spread_of

CONTROLS: dict[Control, str] = {"static": "4 2", "layers": "7 2", "shuffled": "4 2 1 2", "random": "1 2.5"}
"""Dashes of each control's line, as lengths of strokes and gaps."""
_NAMES: dict[Metric, str] = {"perplexity": "perplexity", "kl": "KL (nats per token)"}
_SHIFT = 0.018


def pareto_chart(report: ReportInput, strategies: Sequence[Strategy], metric: Metric) -> Chart | None:
    """The chart of ``perplexity`` or ``kl`` against used bits; None if no run has measured a router.

    Args:
        report: All that the report says, of which the used bits of the table are taken.
        strategies: Strategies with their finished runs.
        metric: ``perplexity`` or ``kl``.
    """
    drawn = [s for s in strategies if curve(s.runs, "router", metric)]
    if not drawn:
        return None
    panels = [Panel(f"{_NAMES[metric]} (log scale)", partial(_draw_all, strategies=drawn, metric=metric), 3.4)]
    between = _between(drawn, columns_of(report.table), metric)
    if len(drawn) > 1 and any(points for _, points in between):
        panels.append(
            Panel("routers: % above their mean, at equal used bits", partial(_draw_between, curves=between), 3.4)
        )
    controls = [control for control in CONTROLS if any(curve(s.runs, control, metric) for s in drawn)]
    for control in controls:
        draw = partial(_draw_against, strategies=drawn, control=control, metric=metric)
        panels.append(Panel(f"routers: % above {SHORT[control]} of the same run", draw, 3.4))
    key = key_of(drawn)
    key += [KeyEntry(f"{SHORT[name]} (of each strategy)", GREY, dashes=CONTROLS[name]) for name in controls]
    key.append(KeyEntry("round to nearest", GREY, "s", "0 9"))
    key += [KeyEntry("full precision", INK, dashes="5 1.5 1 1.5")] if metric == "perplexity" else []
    heading = "Perplexity" if metric == "perplexity" else "KL to full precision"
    return Chart(f"pareto-{metric}", f"{heading} against used bits", _caption(metric, len(drawn) > 1), panels, key)


def _caption(metric: Metric, several: bool) -> str:
    text = (
        "Lower is better everywhere. The first panel has every allocation as measured, over the bits that routers used; rounding "
        "beyond that is in the table of measured points below. "
    )
    if several:
        text += "The second shows routers alone at equal used bits, in percent of the mean over strategies with the same seed. "
    text += (
        "The panels against controls compare each router with those of its own run, which were given the very bits that it "
        "used: below zero, routing wins. Bars are standard deviations over runs; points are moved apart a little "
        "so that bars can be told apart."
    )
    return text + (" Full precision has no line: its KL is 0." if metric == "kl" else "")


def _draw_all(axes: Any, strategies: Sequence[Strategy], metric: Metric) -> None:
    for strategy in strategies:
        for control, dashes in CONTROLS.items():
            points = curve(strategy.runs, control, metric)
            style = (0, tuple(float(d) for d in dashes.split()))
            axes.plot([p.x for p in points], [p.mean for p in points], color=GREY, linewidth=1, linestyle=style)
    for strategy in strategies:
        draw_curve(axes, curve(strategy.runs, "router", metric), strategy)
    low, high = _range([p.x for s in strategies for p in curve(s.runs, "router", metric)])
    rounded = {(p.x, p.mean) for s in strategies for p in curve(s.runs, "rtn", metric) if low <= p.x <= high}
    axes.plot(*_columns(rounded), color=GREY, marker="s", markersize=4, linestyle="none", zorder=1)
    if metric == "perplexity":
        for value in {p.mean for s in strategies for p in curve(s.runs, "full", metric)}:
            axes.axhline(value, color=INK, linewidth=1, linestyle=(0, (5, 1.5, 1, 1.5)))
    axes.set_xlim(low, high)
    scale_log(axes)
    _label(axes)


def _draw_between(axes: Any, curves: Sequence[tuple[Strategy, Sequence[CurvePoint]]]) -> None:
    _draw_shifted(axes, curves)
    _label(axes)


def _draw_against(axes: Any, strategies: Sequence[Strategy], control: Control, metric: Metric) -> None:
    _draw_shifted(axes, [(s, against(s.runs, control, metric)) for s in strategies])
    _label(axes)


def _draw_shifted(axes: Any, curves: Sequence[tuple[Strategy, Sequence[CurvePoint]]]) -> None:
    """Draws curves of differences in percent around a line at zero."""
    axes.axhline(0, color=INK, linewidth=1)
    bits = [p.x for _, points in curves for p in points]
    step = _SHIFT * (max(bits, default=1) - min(bits, default=0))
    for number, (strategy, points) in enumerate(curves):
        draw_curve(axes, points, strategy, step * (number - (len(curves) - 1) / 2))
    axes.yaxis.set_major_formatter("{x:+.4g} %")


def _between(
    strategies: Sequence[Strategy], bits: Sequence[float], metric: Metric
) -> list[tuple[Strategy, list[CurvePoint]]]:
    """Percent by which each router is above the mean over strategies with the same seed, where all have a figure."""
    found: list[tuple[Strategy, list[CurvePoint]]] = [(strategy, []) for strategy in strategies]
    for asked in bits:
        by_seed: dict[int, list[float]] = {}
        for strategy in strategies:
            for run in strategy.runs:
                point = at_bits([row for row in run.drawn if row.allocation == "router"], asked)
                if point is not None:
                    by_seed.setdefault(run.seed, []).append(point.figure(metric))
        whole = [values for values in by_seed.values() if len(values) == len(strategies)]
        for number, (_, points) in enumerate(found):
            above = [100 * (values[number] / statistics.fmean(values) - 1) for values in whole]
            if above:
                points.append(CurvePoint(asked, statistics.fmean(above), spread_of(above)))
    return found


def _range(bits: Sequence[float]) -> tuple[float, float]:
    margin = 0.04 * (max(bits) - min(bits)) or 0.5
    return min(bits) - margin, max(bits) + margin


def _columns(points: set[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [bits for bits, _ in sorted(points)], [value for _, value in sorted(points)]


def _label(axes: Any) -> None:
    axes.set_xlabel("used code bits per weight")
