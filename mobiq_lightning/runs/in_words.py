"""What the rows of a comparison say in words: where the router wins, what buys nothing, and where calibration did harm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from mobiq_lightning.runs.rows import CONTROLS, SHORT, TIE, Control, MeanRow, Row, summarize

_NOTHING = 1e-6
"""Perplexity below which allocations read the same weights: at the ends of the range nothing is left to choose."""
HARM = 0.1
"""Part of the KL divergence of rounding by which that of the calibrated model must be larger to be called worse."""


def findings(rows: Iterable[Row]) -> list[str]:
    """Says in words what a comparison found.

    Returns:
        The verdict at equal used bits, the one at equal all-in bits, the budgets that buy nothing, and those at which rounding is
        better; those of them that there is something to say of.
    """
    known = list(rows)
    idle, harmed = idle_budgets(known), harmed_depths(known)
    said = [verdict(known), all_in_verdict(known)]
    if idle:
        said.append(
            "More bits that buy nothing: " + _join(f"{b:g} (no better than {lower:g})" for b, lower in idle) + "."
        )
    if harmed:
        worse = _join(f"{b:g} (KL {ours:.4f}, rounding {rounded:.4f})" for b, ours, rounded in harmed)
        said.append(
            f"Rounding to nearest is closer to full precision at {worse}: calibration for fewer bits costs these. "
            "max_saturation of ProgressiveSlices bounds that."
        )
    return [sentence for sentence in said if sentence]


def verdict(rows: Iterable[Row]) -> str:
    """Says in words at which budgets the router has a lower perplexity than the best control, all at equal used bits.

    Returns:
        Sentences about the budgets where it wins, loses and ties; an empty text where there was nothing to choose.
    """
    by_budget: dict[float, dict[str, float]] = {}
    for row in summarize(rows):
        if row.allocation in ("router", *CONTROLS):
            by_budget.setdefault(row.target_bits, {})[row.allocation] = row.perplexity
    controls = [name for name in CONTROLS if any(name in found for found in by_budget.values())]
    leads: dict[float, tuple[float, Control]] = {}
    for bits, perplexity in by_budget.items():
        if not all(0 < value < math.inf for value in perplexity.values()):
            continue  # there is no ratio of what is not finite
        if max(perplexity.values()) - min(perplexity.values()) < _NOTHING or len(perplexity) < 1 + len(controls):
            continue
        best = min(controls, key=lambda name: perplexity[name])
        leads[bits] = perplexity["router"] / perplexity[best] - 1, best
    return _in_words("The router beats {}", leads, len(controls))


def all_in_verdict(rows: Iterable[Row]) -> str:
    """Says in words where the router wins at equal all-in bits, which count what it stores itself.

    A control is taken at the all-in bits of the router: between its budgets by linear interpolation of the perplexity, as a
    mixture of both gives, and beyond its highest budget at that.

    Returns:
        Sentences about the budgets where it wins, loses and ties; an empty text where there was nothing to compare.
    """
    summary = [row for row in summarize(rows) if row.finite]
    curves: dict[Control, list[tuple[float, float]]] = {
        name: sorted((row.all_in_bits, row.perplexity) for row in summary if row.allocation == name)
        for name in CONTROLS
    }
    curves = {name: curve for name, curve in curves.items() if curve}
    leads: dict[float, tuple[float, Control]] = {}
    for row in summary:
        if row.allocation != "router":
            continue
        found = {name: value_at(curve, row.all_in_bits) for name, curve in curves.items()}
        known = {name: value for name, value in found.items() if value is not None}
        if known:
            best = min(known, key=lambda name: known[name])
            leads[row.target_bits] = row.perplexity / known[best] - 1, best
    return _in_words("At equal all-in bits it beats {}", leads, len(curves))


def idle_budgets(rows: Iterable[Row]) -> list[tuple[float, float]]:
    """Finds the budgets at which the router is no better than at a lower one, in perplexity and in KL divergence.

    Returns:
        Each with the lower budget that is as good, in bits asked for, ascending.
    """
    found: list[tuple[float, float]] = []
    best: list[MeanRow] = []
    for row in (row for row in summarize(rows) if row.allocation == "router" and row.finite):
        as_good = [b for b in best if row.perplexity >= b.perplexity and row.kl >= b.kl]
        if as_good:
            found.append((row.target_bits, as_good[0].target_bits))
        best.append(row)
    return found


def harmed_depths(rows: Iterable[Row]) -> list[tuple[float, float, float]]:
    """Finds the depths at which the calibrated model is farther from full precision than the rounded one.

    Returns:
        Bits, KL divergence in nats per token of the router, and of rounding to nearest, ascending; those where the former is
        larger by more than `HARM`.
    """
    kl: dict[float, dict[str, float]] = {}
    for row in summarize(rows):
        if row.allocation in ("router", "rtn"):
            kl.setdefault(row.target_bits, {})[row.allocation] = row.kl
    both = [(bits, found["router"], found["rtn"]) for bits, found in sorted(kl.items()) if len(found) == 2]
    return [(bits, ours, rounded) for bits, ours, rounded in both if ours > (1 + HARM) * rounded]


def value_at(curve: Sequence[tuple[float, float]], bits: float) -> float | None:
    """Reads a measured curve at some bits: a straight line between its points, and beyond its last one at that.

    Args:
        curve: Points (bits, value), bits ascending; at least one.
        bits: Bits per weight.

    Returns:
        The value, or None below the first point, as nobody can have less than the lowest budget.
    """
    if bits < curve[0][0]:
        return None
    for (low, first), (high, second) in pairwise(curve):
        if low < bits < high:
            return first + (second - first) * (bits - low) / (high - low)
    return [value for reached, value in curve if reached <= bits][-1]


def _in_words(beats: str, leads: Mapping[float, tuple[float, Control]], n_controls: int) -> str:
    """Sentences about the leads of the router over the best control, by budget; empty if there are none."""
    wins: list[str] = []
    losses: list[str] = []
    ties: list[str] = []
    for bits, (lead, best) in leads.items():
        group = ties if abs(lead) < TIE else wins if lead < 0 else losses
        group.append(f"{bits:g} ({lead:+.1%} against {SHORT[best]})")
    beaten = beats.format({1: "the one control", 2: "both controls"}.get(n_controls, "all controls"))
    parts = [f"{beaten} at {_join(wins)}." if wins else f"{beaten} nowhere."]
    parts += [f"It is behind at {_join(losses)}."] if losses else []
    parts += [f"Within {TIE:.1%} at {_join(t.split()[0] for t in ties)}."] if ties else []
    return " ".join(parts) if leads else ""


def _join(items: Iterable[str]) -> str:
    return ", ".join(items)
