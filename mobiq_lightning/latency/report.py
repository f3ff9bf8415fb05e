"""Prints the tables of a latency measurement on the terminal, and draws its plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from mobiq_lightning.console import table_console
from mobiq_lightning.latency.journal import Journal, Row

TITLES = {
    "decode": "one token",
    "batch": "several tokens at once",
    "prefill": "many tokens, preparation included",
    "model": "decoding a whole model",
}


def print_report(journal: Journal) -> None:
    """Prints a table for every section that was measured, notes, and a line for each thing that was not measured."""
    output = table_console()
    for section, title in TITLES.items():
        rows = [row for row in journal.rows if row["section"] == section]
        if rows:
            output.print(_table(f"{title} ({journal.head['what']})", rows))
    for line in [*journal.head.get("notes", []), *_ceilings(journal.head)]:
        output.print(line, highlight=False)
    for left in journal.not_measured:
        output.print(f"Not measured: {left}", highlight=False)


def _ceilings(head: dict[str, Any]) -> list[str]:
    lines = []
    if ceilings := head.get("ceilings"):
        lines.append(
            f"Copying moves {ceilings['copy_gb_per_s']:,.1f} GB/s here, read and written; a call that does nothing to speak "
            f"of takes {ceilings['call_us']:.2f} µs."
        )
    if noise := head.get("noise"):
        lines.append(f"Noise: {noise['what']}, differs by {noise['share']:.1%}.")
    return lines


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    speed = any("tokens_per_second" in row for row in rows)
    columns = ["shape", "tokens", "weights", "bits", "µs", "±", "GB/s", "of copy", "against plain"]
    for column in [*columns, *(["tokens/s"] if speed else [])]:
        table.add_column(column, justify="left" if column in ("shape", "weights") else "right", no_wrap=True)
    last = None
    for row in rows:
        if last not in (None, (row["shape"], row["tokens"])):
            table.add_section()
        last = (row["shape"], row["tokens"])
        head = [row["shape"], str(row["tokens"]), row["product"]]
        if "error" in row:
            table.add_row(*head, "", "failed", "", "", "", row["error"].splitlines()[0][:30])
            continue
        bits = row["bits"] if isinstance(row["bits"], str) else f"{row['bits']:g}" if row["bits"] else ""
        share = "" if row["of_copy"] is None else f"{row['of_copy']:.0%}"
        ratio = f"{row['times_plain']:.2f}x" if "times_plain" in row else ""
        figures = [f"{row['us']:,.1f}", f"{row['spread']:.0%}", f"{row['gb_per_s']:,.1f}", share, ratio]
        table.add_row(*head, bits, *figures, *([f"{row['tokens_per_second']:,.1f}"] if speed else []))
    return table


def has_plot(rows: list[Row]) -> bool:
    """Whether there is anything to plot: products of one token with sliced weights, timed beside plain ones."""
    return any(_points(rows, shape) for shape in _shapes(rows))


def plot(content: dict[str, Any], path: Path) -> None:
    """Draws how many times as fast as plain weights one token is multiplied, over bits, with one line per shape.

    Args:
        content: Content of a `Journal`.
        path: PNG file that is written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = content["rows"]
    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    plain = {row["bits"] for row in rows if row["product"] == "plain"}
    label = f"plain weights, {', '.join(f'{bits:g}' for bits in sorted(plain))} bits"
    axes.axhline(1.0, color="black", linewidth=1, linestyle=":", label=label)
    for number, shape in enumerate(_shapes(rows)):
        if points := _points(rows, shape):
            bits, ratio = zip(*points, strict=True)
            style = ("-", "--", "-.")[number // 4 % 3]
            axes.plot(bits, ratio, style, color=f"C{number % 4}", marker="o", markersize=4, linewidth=1.3, label=shape)
    axes.set_xlabel("bits per weight that the token reads")
    axes.set_ylabel("times as fast as plain weights")
    axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.25)
    axes.set_title(
        f"One token times random weights: {content['what']}\n{content['environment']['device']}", fontsize=10
    )
    axes.legend(fontsize=8)
    figure.savefig(path, format="png")


def _shapes(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["shape"] for row in rows if row["section"] == "decode"))


def _points(rows: list[Row], shape: str) -> list[tuple[float, float]]:
    return sorted(
        (row["bits"], row["times_plain"])
        for row in rows
        if row["section"] == "decode" and row["shape"] == shape and row["product"] == "elastic" and "times_plain" in row
    )


def print_budgets(latency: Mapping[str, Any]) -> None:
    """Prints a table of the speed that the callback `LatencyCheck` measured of a model at each budget."""
    table = Table(title=f"Speed on {latency['device']}: {latency['what']}")
    columns = ("target bits", "used bits", "linears, µs", "GB/s", "of copy", f"against {latency['plain']}", "tokens/s")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in latency["budgets"]:
        speed = row["tokens_per_second"]
        table.add_row(
            f"{row['target_bits']:g}",
            f"{row['used_bits']:.2f}",
            f"{row['us']:,.1f}",
            f"{row['gb_per_s']:,.1f}",
            f"{row['of_copy']:.0%}",
            f"{row['times_plain']:.2f}x",
            "not measured" if speed is None else f"{speed:,.1f}",
        )
    table_console().print(table)
