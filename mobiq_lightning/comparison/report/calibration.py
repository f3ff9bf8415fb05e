"""Draws charts of the calibration: error of each block at every depth, loss and budget over progress."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from mobiq_lightning.comparison.report.runs import CurvePoint, Run, Strategy, mean_of
from mobiq_lightning.comparison.report.style import (
    GREY,
    INK,
    Chart,
    KeyEntry,
    Panel,
    color_of,
    depth_color,
    draw_curve,
    key_of,
    scale_log,
)
from mobiq_lightning.runs import spread_of

_MOST_ERROR = 1e30
"""Largest relative error that is drawn; a block that has overflowed may have any."""


def error_chart(strategies: Sequence[Strategy]) -> Chart | None:
    """The chart of each block's error at every depth, with a panel per strategy; None if no run has measured it."""
    drawn = [s for s in strategies if s.diagnosed]
    if not drawn:
        return None
    panels = [Panel("mean over blocks", partial(_draw_means, strategies=drawn))]
    every = [error for s in drawn for found in s.diagnosed for row in found.block_error.relative_error for error in row]
    every = [error for error in every if 0 < error < _MOST_ERROR]  # what is not finite is left out
    if not every:
        return None
    limits = (0.7 * min(every), 1.4 * max(every))  # the same for all strategies
    panels += [Panel(f"{s.name}: by block", partial(_draw_blocks, strategy=s, limits=limits)) for s in drawn]
    depths = sorted({depth for s in drawn for found in s.diagnosed for depth in found.depths})
    key = [*key_of(drawn), *(KeyEntry(f"{depth} bits", depth_color(depth)) for depth in depths)]
    caption = (
        "Relative squared error of each decoder block's output at every depth that its slices give, all tokens alike, mean over "
        "tokens. A block is given what the full-precision block is given, so errors of the blocks before it do not count."
    )
    return Chart("block-error", "Block error per slice", caption, panels, key)


def _draw_means(axes: Any, strategies: Sequence[Strategy]) -> None:
    for number, strategy in enumerate(strategies):
        found = strategy.diagnosed
        means = [[statistics.fmean(c) for c in zip(*d.block_error.relative_error, strict=True)] for d in found]
        points = [
            CurvePoint(depth, statistics.fmean(values), spread_of(values))
            for depth, values in zip(found[0].depths, zip(*means, strict=True), strict=True)
        ]
        points = [point for point in points if 0 < point.mean < _MOST_ERROR]
        draw_curve(axes, points, strategy, 0.03 * (number - (len(strategies) - 1) / 2))
    scale_log(axes)
    axes.set_xlabel("depth in bits")


def _draw_blocks(axes: Any, strategy: Strategy, limits: tuple[float, float]) -> None:
    errors = mean_of([found.block_error.relative_error for found in strategy.diagnosed])
    for depth, values in zip(strategy.diagnosed[0].depths, zip(*errors, strict=True), strict=True):
        shown = [value if value < _MOST_ERROR else math.nan for value in values]
        axes.plot(range(len(errors)), shown, color=depth_color(depth), marker=".", linewidth=1.3)
    axes.set_ylim(*limits)
    scale_log(axes)
    axes.set_xlabel("block")
    axes.xaxis.get_major_locator().set_params(integer=True)


def progress_charts(strategies: Sequence[Strategy]) -> list[Chart]:
    """The charts of the loss and of the budget over the progress of calibration; empty if no run has a journal."""
    drawn = [s for s in strategies if any(run.epochs for run in s.runs)]
    if not drawn:
        return []
    losses = Chart(
        "calibration-loss",
        "Loss over progress",
        "Mean loss of each epoch, a line per block and strategy; the band is the standard deviation over runs. It jumps where a "
        "stage begins that adds to the loss. What is summed in the loss, and at which budget, may differ between strategies: "
        "compare shapes, not heights.",
        [Panel("loss (log scale)", partial(_draw_losses, strategies=drawn), 3.2)],
        key_of(drawn),
    )
    asked = [entry["target_bits"] for s in drawn for run in s.runs for entry in (*run.epochs, *run.steps)]
    limits = (min(asked) - 0.3, max(asked) + 0.3)
    budgets = Chart(
        "calibration-budget",
        "Budget over progress",
        "Bits asked for while blocks are calibrated: lines are means of epochs, dots single steps as they were logged, and "
        "crosses what the gates spent where the objective measures it. One run per strategy, its first.",
        [Panel(s.name, partial(_draw_budget, strategy=s, limits=limits), 2.4) for s in drawn],
        [KeyEntry("asked for", GREY, "."), KeyEntry("spent by the gates", INK, "x", "0 9")],
    )
    return [losses, budgets]


def _draw_losses(axes: Any, strategies: Sequence[Strategy]) -> None:
    for strategy in strategies:
        for block in zip(*(_by_block(run) for run in strategy.runs if run.epochs), strict=False):
            epochs = list(zip(*block, strict=False))  # the same epoch of all runs
            xs = [entries[0][0] for entries in epochs]
            losses = [[entry["loss"] for _, entry in entries] for entries in epochs]
            means, spreads = [statistics.fmean(v) for v in losses], [spread_of(v) for v in losses]
            axes.plot(xs, means, ".-", color=color_of(strategy), linewidth=1.3, markersize=4)
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(xs, low, high, color=color_of(strategy), alpha=0.15, linewidth=0)
    scale_log(axes)
    _label_blocks(axes, [run for strategy in strategies for run in strategy.runs if run.epochs])


def _draw_budget(axes: Any, strategy: Strategy, limits: tuple[float, float]) -> None:
    run = next(run for run in strategy.runs if run.epochs)
    color = color_of(strategy)
    for block in _by_block(run):
        axes.plot([x for x, _ in block], [entry["target_bits"] for _, entry in block], color=color, linewidth=1.3)
    share = _blocks_per_step(run)
    steps = [((entry["step"] + 0.5) * share, entry) for entry in run.steps]
    axes.plot([x for x, _ in steps], [e["target_bits"] for _, e in steps], ".", color=color, markersize=4, alpha=0.6)
    spent = [(x, entry["routed_bits"]) for x, entry in steps if "routed_bits" in entry]
    axes.plot([x for x, _ in spent], [bits for _, bits in spent], "x", color=INK, markersize=3, alpha=0.6)
    axes.set_ylabel("bits")
    axes.set_ylim(*limits)
    axes.yaxis.set_major_formatter("{x:.3g}")
    _label_blocks(axes, [run])


def _by_block(run: Run) -> list[list[tuple[float, Mapping[str, float]]]]:
    """The epochs of each block, each with its middle in units of blocks: 1.5 is half way through the second."""
    blocks: dict[float, list[tuple[float, Mapping[str, float]]]] = {}
    before, share = 0.0, _blocks_per_step(run)
    for entry in run.epochs:
        end = entry["step"] + 1
        blocks.setdefault(entry["index"], []).append(((before + end) / 2 * share, entry))
        before = end
    return list(blocks.values())


def _blocks_per_step(run: Run) -> float:
    return (run.epochs[-1]["index"] + 1) / (run.epochs[-1]["step"] + 1)


def _label_blocks(axes: Any, runs: Sequence[Run]) -> None:
    axes.set_xlabel("blocks calibrated")
    axes.set_xlim(0, max(run.epochs[-1]["index"] for run in runs) + 1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
