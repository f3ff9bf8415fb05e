"""One elastic checkpoint beside peers that are calibrated for one precision each: perplexity and KL divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .figure import STYLES

ELASTIC, FULL = "elastic, one checkpoint", "full precision"


def rows_of(found: dict[str, Any]) -> dict[str, dict[float, tuple[float, float]]]:
    """Perplexity and KL divergence by name and bits, of every peer and of the router of our checkpoint.

    Args:
        found: What `real-model.json` holds.
    """
    rows: dict[str, dict[float, tuple[float, float]]] = {}
    for row in found.get("peers", {}).get("means", []):
        rows.setdefault(row["peer"], {})[row["bits"]] = (row["perplexity"], row["kl"])
    ours = [row for row in found["run"]["rows"] if row["allocation"] == "router"]
    return {**rows, ELASTIC: {row["target_bits"]: (row["perplexity"], row["kl"]) for row in ours}}


def full_precision(found: dict[str, Any]) -> float:
    """Perplexity of the model as it was given."""
    return float(next(row["perplexity"] for row in found["run"]["rows"] if row["allocation"] == "full"))


def cells(found: dict[str, Any], bits: Sequence[float]) -> list[list[str]]:
    """Lines of the table: a name, and for each budget perplexity and KL divergence, empty where there is none."""
    lines = []
    for name, values in rows_of(found).items():
        shown = [figures(*values[b]) if b in values else "" for b in bits]
        lines.append([STYLES[name][0] if name in STYLES else name, *shown])
    return lines


def figures(perplexity: float, kl: float) -> str:
    """Perplexity and KL divergence in a cell; large ones are of broken models, of which digits say nothing."""
    if not math.isfinite(perplexity):
        return "not finite"
    return f"{perplexity:,.0f} / {kl:.2f}" if perplexity >= 1000 else f"{perplexity:.2f} / {kl:.4f}"


def print_table(found: dict[str, Any], name: str) -> None:
    """Prints it on standard output."""
    from rich.console import Console
    from rich.table import Table

    bits = sorted({b for values in rows_of(found).values() for b in values})
    table = Table(title=f"{name}: perplexity / KL in nats, full precision {full_precision(found):.2f}")
    for column in ("", *(f"{b:g} bits" for b in bits)):
        table.add_column(column, justify="right" if column else "left")
    for line in cells(found, bits):
        table.add_row(*line)
    Console(width=160).print(table)
