"""The table on the terminal."""

from __future__ import annotations

from typing import Any

from .rows import DONE, FULL, NOT_OFFERED


def figures(found: dict[str, Any], group_size: int) -> dict[tuple[str, int], str]:
    """What stands in the table for a peer and its bits: mean, spread and number of seeds, or why there is no figure."""
    cells = {(peer, b): NOT_OFFERED for peer, missing in found["not_offered"].items() for b in missing}
    cells |= {
        (row["peer"], row["bits"]): row["status"]
        for row in found["rows"]
        if row["group_size"] == group_size and row["status"] != DONE
    }
    for row in found["means"]:
        if row["group_size"] == group_size:
            spread = f" ± {row['spread']:.2f} ({row['n']})" if row["n"] > 1 else ""
            cells[row["peer"], row["bits"]] = f"{row['perplexity']:.2f}{spread}"
    return cells


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """A line for every peer that has a row without a figure: each of its errors once, with the rows it concerns."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != DONE:
            where = f"{row['bits']} bits, group {row['group_size']}"
            found.setdefault((row["peer"], f"{row['status']}: {row['error']}"), []).append(where)
    return [f"{peer} ({_places(places)}) {error}" for (peer, error), places in found.items()]


def _places(places: list[str]) -> str:
    unique = list(dict.fromkeys(places))
    return unique[0] if len(unique) == 1 else f"{unique[0]} and {len(unique) - 1} more"


def print_peers(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    for group_size in sorted({row["group_size"] for row in found["rows"]}):
        console.print(of_group(found, group_size))
    for line in failures(found["rows"]):
        console.print(line, markup=False, highlight=False)


def of_group(found: dict[str, Any], group_size: int) -> Any:
    """A `rich` table: a line per peer, a column per precision, then the best peer and the targets."""
    from rich.table import Table

    protocol = found["protocol"]
    title = f"{found['model']}, group {group_size}, {protocol['n_tokens']} tokens, full precision {found[FULL]:.2f}"
    table = Table(title=title)
    bits = sorted({row["bits"] for row in found["rows"]})
    for name in ("perplexity", *(f"{b} bits" for b in bits)):
        table.add_column(name, justify="left" if name == "perplexity" else "right")
    here = figures(found, group_size)
    for peer in dict.fromkeys(row["peer"] for row in found["rows"] if row["group_size"] == group_size):
        table.add_row(peer, *(here.get((peer, b), "") for b in bits))
    table.add_section()
    verdicts = {v["bits"]: v for v in found["verdicts"] if v["group_size"] == group_size}
    lines = {"best peer": best, "target": target, "elastic, one checkpoint": elastic}
    for name, line in lines.items():
        table.add_row(name, *(line(verdicts[b]) if b in verdicts else "" for b in bits))
    return table


def best(verdict: dict[str, Any]) -> str:
    return f"{verdict['best']:.2f} {verdict['best_peer']}"


def target(verdict: dict[str, Any]) -> str:
    return f"{verdict['target']:.2f} ({verdict['share']:g}x)"


def elastic(verdict: dict[str, Any]) -> str:
    if verdict["ours"] is None:
        return ""
    return f"{verdict['ours']:.2f} ({verdict['ratio']:.3f}x, {'met' if verdict['met'] else 'not met'})"
