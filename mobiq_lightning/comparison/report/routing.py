"""Draws charts of what routers do: bits per input, depths, bits by token position and token frequency."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from mobiq_lightning.comparison.report.runs import CurvePoint, Strategy, mean_of
from mobiq_lightning.comparison.report.style import INK, Chart, KeyEntry, Panel, depth_color, draw_curve, key_of, plain
from mobiq_lightning.runs import BudgetUse, ClassUse, Diagnostics, spread_of

_LABELLED = 48
"""Up to this many inputs, each has its name and figures in a chart; with more, the first of each block has its name."""
_ONE_DEPTH = 0.995
_MOST_BUDGETS = 4
_Kind = Literal["by_position", "by_frequency"]
_BLACK = "#010101"  # black itself is left out of an SVG, and the page's ink would take its place


def routing_charts(strategies: Sequence[Strategy]) -> list[Chart]:
    """The charts of what routers do, without those that no run has measured anything for."""
    drawn = [s for s in strategies if s.diagnosed and s.diagnosed[0].budgets]
    if not drawn:
        return []
    return [_bits_chart(drawn), _shares_chart(drawn), *_by_input_chart(drawn), *_use_charts(drawn)]


def _bits_chart(strategies: Sequence[Strategy]) -> Chart:
    tables = {s.name: mean_of([_bits(d) for d in s.diagnosed]) for s in strategies}
    away = max(abs(b - m) for s in strategies for row, m in zip(tables[s.name], _used(s), strict=True) for b in row)
    panels = [
        Panel(s.name, partial(_draw_bits, strategy=s, table=tables[s.name], away=max(away, 0.01)), _tall(s))
        for s in strategies
    ]
    caption = (
        "Mean bits that tokens read of each input's weights, over runs; columns are the budgets asked for. Colour is the "
        "distance to what the whole model used at that budget: red reads more, blue less. An input carries the name of the first "
        "linear that reads it."
    )
    return Chart("layer-bits", "Bits per layer", caption, panels, wide=True)


def _draw_bits(axes: Any, strategy: Strategy, table: Sequence[Sequence[float]], away: float) -> None:
    budgets = strategy.diagnosed[0].budgets
    columns = [list(values) for values in zip(*table, strict=True)]  # inputs x budgets
    shown = [[bits - used for bits, used in zip(row, _used(strategy), strict=True)] for row in columns]
    image = axes.imshow(shown, cmap="RdBu_r", vmin=-away, vmax=away, aspect="auto", interpolation="none")
    axes.grid(False)
    axes.set_xticks(range(len(budgets)), [f"{b.target_bits:g}" for b in budgets])
    axes.set_xlabel("bits asked for")
    _name_inputs(axes, strategy)
    if len(columns) <= _LABELLED:
        for row, values in enumerate(columns):
            for column, bits in enumerate(values):
                color = "white" if abs(shown[row][column]) > 0.65 * away else _BLACK
                axes.text(column, row, f"{bits:.2f}", ha="center", va="center", size=6.5, color=color)
    axes.figure.colorbar(image, ax=axes, format="{x:+.2g}", aspect=30, pad=0.02)


def _shares_chart(strategies: Sequence[Strategy]) -> Chart:
    panels = [Panel(s.name, partial(_draw_shares, strategy=s)) for s in strategies]
    caption = (
        "Share of tokens that read each depth, at each budget asked for; inputs count by their weights. A bar of one colour is a "
        "router with nothing to choose, or one that chooses nothing."
    )
    return Chart("depth-shares", "Depths read", caption, panels, _depth_key(strategies))


def _draw_shares(axes: Any, strategy: Strategy) -> None:
    found = strategy.diagnosed
    budgets = [b.target_bits for b in found[0].budgets]
    shares = [[_weighted(d, budget.depth_share) for budget in d.budgets] for d in found]
    _stack(axes.bar, mean_of(shares), found[0].depths)
    axes.set_xticks(range(len(budgets)), [f"{bits:g}" for bits in budgets])
    axes.set_xlabel("bits asked for")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(False)


def _by_input_chart(strategies: Sequence[Strategy]) -> list[Chart]:
    mixed = _mixed_budgets(strategies)
    if not mixed:
        return []
    bits = max(mixed, key=lambda b: _mixture(strategies, b))
    panels = [Panel(s.name, partial(_draw_by_input, strategy=s, bits=bits), _tall(s)) for s in strategies]
    caption = f"The same for each input, at {bits:g} bits asked for: the budget at which depths are mixed most."
    return [
        Chart("depth-histograms", f"Depths read by layer, at {bits:g} bits", caption, panels, _depth_key(strategies))
    ]


def _draw_by_input(axes: Any, strategy: Strategy, bits: float) -> None:
    shares = mean_of([_budget(d, bits).depth_share for d in strategy.diagnosed])
    _stack(axes.barh, shares, strategy.diagnosed[0].depths)
    _name_inputs(axes, strategy)
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(False)


def _use_charts(strategies: Sequence[Strategy]) -> list[Chart]:
    """The charts of bits by token position and by token frequency, each with a panel per budget."""
    budgets = _mixed_budgets(strategies)
    chosen = (
        [budgets[round(i * (len(budgets) - 1) / (_MOST_BUDGETS - 1))] for i in range(_MOST_BUDGETS)] if budgets else []
    )
    explained = (
        "A token's bits are its mean over inputs, weighted by their weights; the line at zero is what the run used."
    )
    charts = []
    kinds: Sequence[tuple[_Kind, str, str]] = (
        ("by_position", "token position", "position in the window"),
        ("by_frequency", "token frequency", "occurrences of the token in the evaluation text"),
    )
    for kind, name, axis in kinds:
        panels = [
            Panel(
                f"{bits:g} bits asked for", partial(_draw_use, strategies=strategies, bits=bits, kind=kind, axis=axis)
            )
            for bits in dict.fromkeys(chosen)
        ]
        if panels:
            caption = f"Bits that tokens read above the average, by {name}. {explained} Bars are standard deviations over runs."
            charts.append(Chart(name.replace(" ", "-"), f"Router use by {name}", caption, panels, key_of(strategies)))
    return charts


def _draw_use(axes: Any, strategies: Sequence[Strategy], bits: float, kind: _Kind, axis: str) -> None:
    names: list[str] = []
    for strategy in strategies:  # classes of a run may lack some of another's
        for found in strategy.diagnosed:
            names += [c.name for c in _classes(_budget(found, bits), kind) if c.name not in names]
    names.sort(key=lambda name: int(name.split("-")[0]))
    for number, strategy in enumerate(strategies):
        points = []
        for place, name in enumerate(names):
            values = [
                above for found in strategy.diagnosed for above in _above(_classes(_budget(found, bits), kind), name)
            ]
            if values:
                points.append(CurvePoint(place, statistics.fmean(values), spread_of(values)))
        draw_curve(axes, points, strategy, 0.06 * (number - (len(strategies) - 1) / 2))
    axes.axhline(0, color=INK, linewidth=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlabel(axis)
    axes.yaxis.set_major_formatter("{x:+.3g}")


def _above(classes: Sequence[ClassUse], name: str) -> list[float]:
    """Bits of a class above the mean over all tokens; nothing if the run has no such class."""
    mean = sum(c.tokens * c.bits for c in classes) / sum(c.tokens for c in classes)
    return [c.bits - mean for c in classes if c.name == name]


def _bits(diagnostics: Diagnostics) -> list[Sequence[float]]:
    """Mean bits of each input at each budget (budgets, inputs)."""
    return [budget.mean_bits for budget in diagnostics.budgets]


def _used(strategy: Strategy) -> list[float]:
    """Bits that the whole model used at each budget, mean over runs."""
    return [row[0] for row in mean_of([[[_model_bits(d, b)] for b in d.budgets] for d in strategy.diagnosed])]


def _model_bits(diagnostics: Diagnostics, budget: BudgetUse) -> float:
    return _weighted(diagnostics, [[bits] for bits in budget.mean_bits])[0]


def _weighted(diagnostics: Diagnostics, table: Sequence[Sequence[float]]) -> list[float]:
    """Mean over inputs (rows), weighted by their weights."""
    weights = [entry.weights for entry in diagnostics.inputs]
    return [
        sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights) for values in zip(*table, strict=True)
    ]


def _budget(diagnostics: Diagnostics, bits: float) -> BudgetUse:
    return next(budget for budget in diagnostics.budgets if budget.target_bits == bits)


def _classes(budget: BudgetUse, kind: _Kind) -> Sequence[ClassUse]:
    return budget.by_position if kind == "by_position" else budget.by_frequency


def _mixed_budgets(strategies: Sequence[Strategy]) -> list[float]:
    """Budgets that all runs have, at which some router's tokens read different depths."""
    runs = [found for s in strategies for found in s.diagnosed]
    common = [b.target_bits for b in runs[0].budgets if all(_has(found, b.target_bits) for found in runs)]
    return [bits for bits in common if _mixture(strategies, bits) > 1 - _ONE_DEPTH]


def _has(diagnostics: Diagnostics, bits: float) -> bool:
    return any(budget.target_bits == bits for budget in diagnostics.budgets)


def _mixture(strategies: Sequence[Strategy], bits: float) -> float:
    """Share of tokens that do not read the commonest depth of their input, mean over runs and inputs."""
    tables = [_budget(found, bits).depth_share for s in strategies for found in s.diagnosed]
    return statistics.fmean(1 - max(share) for table in tables for share in table)


def _tall(strategy: Strategy) -> float:
    n_inputs = len(strategy.diagnosed[0].inputs)
    return max(2.4, 0.7 + (0.2 * n_inputs if n_inputs <= _LABELLED else min(8.0, 0.05 * n_inputs)))


def _name_inputs(axes: Any, strategy: Strategy) -> None:
    """Labels the y axis with the inputs, shortened such as ``3.mlp.up_proj`` for ``model.layers.3.mlp.up_proj``."""
    names = [entry.name for entry in strategy.diagnosed[0].inputs]
    cut = [next((i for i, part in enumerate(name.split(".")) if part.isdigit()), 0) for name in names]
    short = [".".join(name.split(".")[start:]) for name, start in zip(names, cut, strict=True)]
    places = list(range(len(short)))
    if len(short) > _LABELLED:
        places = [i for i in places if i == 0 or short[i].split(".")[0] != short[i - 1].split(".")[0]]
    axes.set_yticks(places, [plain(short[i]) for i in places], fontsize=7)


def _stack(bar: Any, shares: Sequence[Sequence[float]], depths: Sequence[int]) -> None:
    """Draws stacked bars of shares (bars, depths)."""
    start = [0.0] * len(shares)
    for depth, values in zip(depths, zip(*shares, strict=True), strict=True):
        place = {"left": list(start)} if bar.__name__ == "barh" else {"bottom": list(start)}
        bar(range(len(shares)), values, 0.8, color=depth_color(depth), **place)
        start = [a + b for a, b in zip(start, values, strict=True)]


def _depth_key(strategies: Sequence[Strategy]) -> list[KeyEntry]:
    depths = sorted({depth for s in strategies for found in s.diagnosed for depth in found.depths})
    return [KeyEntry(f"{depth} bits", depth_color(depth), "#") for depth in depths]
