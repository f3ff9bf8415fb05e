"""Prints the tables of outlier migration on the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from mobiq_lightning.console import table_console
from mobiq_lightning.outliers.findings import ALL, NONE, matrix_verdict, overlap_verdict

CALIBRATIONS = {ALL: "all depths at once", NONE: "not calibrated"}


def print_overlaps(tokens: dict[str, Any]) -> None:
    """Prints how many of the worst tokens two precisions have in common.

    Args:
        tokens: Figures by name. ``elastic`` is one checkpoint at all precisions. Where they were measured,
            ``own_calibration`` is each precision calibrated alone, ``uncalibrated`` is round-to-nearest, and
            ``same_bits`` the control. The first three are as `summarize_tokens` returns them.
    """
    elastic = tokens["elastic"]
    names = {"own_calibration": "own calibration", "uncalibrated": "uncalibrated"}
    others = {title: tokens[key]["model"]["overlap"] for key, title in names.items() if key in tokens}
    table = Table(
        title=f"Worst {elastic['share']:.0%} of {elastic['n_tokens']} tokens that two precisions share",
    )
    of_inputs = ("inputs, mean", "lowest", "highest") if elastic["inputs"] else ()
    for column in ("bits", "model (KL)", "rank corr.", *others, *of_inputs):
        table.add_column(column, justify="right", no_wrap=True)
    for pair, value in elastic["model"]["overlap"].items():
        shares = [o[pair] for o in others.values()]
        if of_inputs:
            per_input = [found["overlap"][pair] for found in elastic["inputs"].values()]
            shares += [elastic["inputs_mean"]["overlap"][pair], min(per_input), max(per_input)]
        cells = [f"{s:.0%}" for s in shares]
        rank = f"{elastic['model']['rank_correlation'][pair]:.2f}"
        table.add_row(pair.replace("-", " and "), f"{value:.0%}", rank, *cells)
    _print(table, overlap_verdict(tokens))


def print_matrix(matrix: dict[str, Any]) -> None:
    """Prints the perplexity of every calibration at every precision, and in words what that says.

    Args:
        matrix: ``rows`` as `matrix_rows` returns them, and ``full_perplexity``.
    """
    rows = matrix["rows"]
    table = Table(
        title=f"Perplexity by calibrated at and used at; full precision {matrix['full_perplexity']:.2f}",
        caption="in brackets: against the model calibrated for the bits it is used at",
    )
    table.add_column("calibrated at", no_wrap=True)
    by_calibration: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        by_calibration.setdefault(row["calibrated_at"], []).append(row)
    for row in next(iter(by_calibration.values())):
        table.add_column(f"used at {row['used_at']}", justify="right", no_wrap=True)
    for calibrated_at, found in by_calibration.items():
        cells = [f"{r['perplexity']:.2f}" + _bracket(r) for r in found]
        table.add_row(CALIBRATIONS.get(calibrated_at, f"{calibrated_at} bits"), *cells)
    _print(table, matrix_verdict(rows))


def _bracket(row: dict[str, Any]) -> str:
    return "" if row["calibrated_at"] == row["used_at"] else f" ({row['change']:+.1%})"


def _print(table: Table, verdict: str) -> None:
    console = table_console()
    console.print(table)
    console.print(verdict, highlight=False)
