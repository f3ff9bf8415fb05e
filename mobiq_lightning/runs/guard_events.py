"""What guards of a calibration have noticed: events of results.json, and in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mobiq_lightning.runs.record import Record

GuardName = Literal["worse_block", "worse_depth", "exploding_probe", "collapsed_router", "outlier_weight"]
GuardAction = Literal["stop", "repair", "record"]
"""What was done about an event: the run ended, it was mended, or nothing."""

_DONE = {
    ("worse_block", True): "the block fell back to round-to-nearest at all depths",
    ("worse_block", False): "the model went back to what it was before this stage",
    ("collapsed_router", True): "its input gets static depths at such budgets",
}


@dataclass(frozen=True)
class GuardEvent(Record):
    """One thing that a guard has noticed.

    Args:
        guard: The guard.
        block: Index of the block, from 0; None if the whole model was looked at.
        input: Name of the input whose router collapsed, or of the linear with an outlier; None for the other guards.
        action: What was done about it.
        epoch: Epoch in which it was seen, from 0.
        depth: Depth or budget at which it was seen, in bits.
        value: What was measured: a relative error, a KL divergence in nats, a perplexity, a share of the tokens, or how many
            times the typical magnitude a weight is; None in files if it was not finite.
        limit: What it should not have exceeded; None in files if it was not finite.
    """

    guard: GuardName
    block: int | None
    input: str | None
    action: GuardAction
    epoch: int
    depth: float
    value: float | None
    limit: float | None


def sentence(event: GuardEvent, n_epochs: int | None = None) -> str:
    """One line about an event.

    Args:
        event: What was noticed.
        n_epochs: Epochs of the whole fit, if known.
    """
    of_block = event.block is not None
    place = "the whole model" if event.block is None else f"block {event.block + 1}"
    value, limit = _number(event.value), _number(event.limit)
    if event.guard == "collapsed_router":
        what = (
            f"Router collapse: at {event.depth:g} bits, {event.value:.1%} of the tokens of {event.input} read the same depth "
            f"(limit {event.limit:.1%})"
        )
    elif event.guard == "outlier_weight":
        what = (
            f"Outlier weight: the largest weight of {event.input} is {value} times the typical magnitude there (limit {limit}), "
            f"so a range that holds it rounds the others of its group to one value, at all depths up to {event.depth:g} bits"
        )
    elif event.guard == "worse_block":
        measure = "a relative error" if of_block else "a KL divergence"
        what = f"Worse than round-to-nearest: {place} at {event.depth:g} bits has {measure} of {value}, limit {limit}"
    elif event.guard == "worse_depth":
        what = (
            f"Worse than round-to-nearest at {event.depth:g} bits: the whole model has a KL divergence of {value} there on "
            f"calibration windows, limit {limit}"
        )
    else:
        what = f"Exploding perplexity: {value} on calibration windows after {place}, at {event.depth:g} bits; limit {limit}"
    epoch = f"epoch {event.epoch + 1}" + ("" if n_epochs is None else f" of {n_epochs}")
    mended = _DONE.get((event.guard, True)) if event.guard == "collapsed_router" else _DONE["worse_block", of_block]
    done = {"repair": mended, "record": "nothing was changed", "stop": "the run stops"}[event.action]
    return f"{what} ({epoch}); {done}."


def sentences(events: Iterable[GuardEvent]) -> list[str]:
    """One line per event."""
    return [sentence(event) for event in events]


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"
