"""What guards have noticed, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_DONE = {
    ("worse_block", True): "the block fell back to round-to-nearest at all depths",
    ("worse_block", False): "the model went back to what it was before this stage",
    ("collapsed_router", True): "its input gets static depths at such budgets",
}


def sentence(event: Mapping[str, Any], n_epochs: int | None = None) -> str:
    """One line about an event of `guards` in results.json.

    Args:
        event: guard, block (from 0; None: the whole model), input (of a router), depth (in bits), value and limit (None: not
            finite), action, epoch (from 0).
        n_epochs: Of the whole fit, if known.
    """
    guard, depth, of_block = event["guard"], event["depth"], event["block"] is not None
    place = f"block {event['block'] + 1}" if of_block else "the whole model"
    value, limit = _number(event["value"]), _number(event["limit"])
    if guard == "collapsed_router":
        what = (
            f"Router collapse: at {depth:g} bits, {event['value']:.1%} of the tokens of {event['input']} read the same depth "
            f"(limit {event['limit']:.1%})"
        )
    elif guard == "worse_block":
        measure = "a relative error" if of_block else "a KL divergence"
        what = f"Worse than round-to-nearest: {place} at {depth:g} bits has {measure} of {value}, limit {limit}"
    else:
        what = f"Exploding perplexity: {value} on calibration windows after {place}, at {depth:g} bits; limit {limit}"
    epoch = f"epoch {event['epoch'] + 1}" + ("" if n_epochs is None else f" of {n_epochs}")
    known = (guard if guard == "collapsed_router" else "worse_block", of_block or guard == "collapsed_router")
    done = {"repair": _DONE.get(known, ""), "record": "nothing was changed", "stop": "the run stops"}[event["action"]]
    return f"{what} ({epoch}); {done}."


def sentences(results: Mapping[str, Any]) -> list[str]:
    """One line per event of results.json."""
    events: Sequence[Mapping[str, Any]] = results.get("guards") or []
    return [sentence(event) for event in events]


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"
