"""What a run leaves: the rows of a comparison, their names, and the verdict in words."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    pass


COLUMNS = ("allocation", "target_bits", "used_bits", "all_in_bits", "perplexity", "kl", "seed")


TIE = 0.001
"""Relative difference in perplexity below which two allocations count as equal."""


LABELS = {
    "full": "full precision",
    "rtn": "round to nearest",
    "router": "router",
    "static": "static layers",
    "layers": "best layers",
    "shuffled": "shuffled tokens",
    "random": "random tokens",
}


Control = Literal["static", "layers", "shuffled", "random"]


CONTROLS: tuple[Control, ...] = get_args(Control)
"""What a router has to beat at the bits that it used, as far as it was measured; see `controls`."""


SHORT = {**LABELS, "static": "static", "shuffled": "shuffled", "random": "random"}
"""What sentences call an allocation."""


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with those that differ only in the seed of random tokens as one: mean, and `spread` as +-."""
    merged: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        merged.setdefault((row["allocation"], row["target_bits"]), []).append(row)
    summary = []
    for group in merged.values():
        mean = {key: statistics.fmean(row[key] for row in group) for key in COLUMNS[2:6]}
        spread = statistics.stdev(row["perplexity"] for row in group) if len(group) > 1 else 0.0
        summary.append({**group[0], **mean, "spread": spread, "n_seeds": len(group)})
    order = list(LABELS)
    return sorted(
        summary, key=lambda row: (row["allocation"] != "full", row["target_bits"], order.index(row["allocation"]))
    )


def label(allocation: str, results: dict[str, Any]) -> str:
    """What tables call an allocation: a router that cannot be deployed is called so.

    Args:
        allocation: Of a row.
        results: results.json.
    """
    deployable = allocation != "router" or results.get("router", {}).get("deployable", True)
    return LABELS[allocation] if deployable else f"{LABELS[allocation]}, not deployable"


def generated_of(calibration: dict[str, Any]) -> str:
    """What the model wrote itself of the calibration text, as a clause; checkpoints from before that say nothing of it."""
    n_generated = calibration.get("n_generated", 0)
    return f" and {n_generated} windows that the model wrote" if n_generated else ""


def heading(results: dict[str, Any]) -> str:
    """Model, text and protocol; of local files their name, as a path tells nobody anything."""
    protocol = results["protocol"]
    model, data = (
        Path(name).name if Path(name).is_absolute() else name for name in (results["model"], protocol["data"])
    )
    return f"{model} on {data}, {protocol['eval_protocol']}, window {protocol['window']}"


def verdict(rows: list[dict[str, Any]]) -> str:
    """Says in words at which budgets the router has a lower perplexity than the best control that was measured, and where not."""
    by_budget: dict[float, dict[str, float]] = {}
    for row in summarize(rows):
        if row["allocation"] in ("router", *CONTROLS):
            by_budget.setdefault(row["target_bits"], {})[row["allocation"]] = row["perplexity"]
    controls = [name for name in CONTROLS if any(name in found for found in by_budget.values())]
    wins: list[str] = []
    losses: list[str] = []
    ties: list[str] = []
    for bits, perplexity in by_budget.items():
        nothing_left = len({round(value, 6) for value in perplexity.values()}) == 1  # at the ends of the range
        if nothing_left or len(perplexity) < 1 + len(controls):
            continue
        best = min(controls, key=lambda name: perplexity[name])
        lead = perplexity["router"] / perplexity[best] - 1
        group = ties if abs(lead) < TIE else wins if lead < 0 else losses
        group.append(f"{bits:g} ({lead:+.1%} against {SHORT[best]})")
    beaten = {1: "the one control", 2: "both controls"}.get(len(controls), "all controls")
    parts = [f"The router beats {beaten} at {_join(wins)}." if wins else f"The router beats {beaten} nowhere."]
    parts += [f"It is behind at {_join(losses)}."] if losses else []
    parts += [f"Within {TIE:.1%} at {_join([t.split()[0] for t in ties])}."] if ties else []
    return " ".join(parts) if wins or losses or ties else ""


def _join(items: list[str]) -> str:
    return ", ".join(items)


def bits_text(entry: dict[str, Any]) -> str:
    """Of what the harness gave: the budget, or ``full``."""
    return entry["bits"] if isinstance(entry["bits"], str) else f"{entry['bits']:g}"
