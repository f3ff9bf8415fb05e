"""Numbers of a recipe that are outside of what can be used, found without importing the classes that use them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mobiq_lightning.errors import shown

COUNT = 10**9
"""Most windows, tokens or epochs that a recipe may ask for."""
SEED = 2**32 - 1
"""Highest seed that all generators take."""


@dataclass(frozen=True)
class Range:
    """The numbers that a key takes.

    Args:
        low: The lowest.
        high: The highest.
        whole: Whether only whole numbers make sense.
        above: Whether `low` itself is too low.
        listed: Whether the key takes a list of such numbers.
        empty: Whether that list may be empty.
    """

    low: float
    high: float = math.inf
    whole: bool = True
    above: bool = False
    listed: bool = False
    empty: bool = True

    def __str__(self) -> str:
        kind = "whole number" if self.whole else "number"
        low = f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
        high = f" and at most {self.high:,.0f}" if math.isfinite(self.high) else ""
        return f"a {'list of ' if self.listed else ''}{kind}{'s' if self.listed else ''} {low}{high}"

    def holds(self, number: float) -> bool:
        """Whether a number lies in it."""
        if isinstance(number, float) and (not math.isfinite(number) or (self.whole and not number.is_integer())):
            return False
        return (number > self.low if self.above else number >= self.low) and number <= self.high


_RATE = Range(0, 1e6, whole=False, above=True)
_FROM_ONE, _FROM_ZERO, _SEED = Range(1, COUNT), Range(0, COUNT), Range(0, SEED)
RANGES = {
    "seed_everything": _SEED,
    **{f"data.{key}": _FROM_ONE for key in ("n_samples", "seq_len", "batch_size", "eval_seq_len", "eval_batch_size")},
    "data.eval_max_windows": _FROM_ONE,
    "data.n_generated": _FROM_ZERO,
    "data.seed": _SEED,
    "model.epochs_per_block": _FROM_ONE,
    "model.eval_bits": Range(1, 8, whole=False, listed=True, empty=False),
    "model.random_seeds": Range(0, SEED, listed=True),
    "model.slices.init_args.group_size": Range(1, 2**31 - 1),
    "model.router.init_args.hidden_features": Range(1, 10**6),
    **{f"model.rates.{key}": _RATE for key in ("ranges", "codes", "transforms", "routers")},
    "model.rates.warmup": Range(0, 1, whole=False),
}
"""Ranges of the numbers of a recipe, by key. What strategies take, they check themselves."""


def range_problems(key: str, value: Any) -> list[str]:
    """A line if a value of a recipe is no number, or lies outside of the range of its key.

    Args:
        key: Dotted key.
        value: What the recipe says.
    """
    if key == "model.rates" and isinstance(value, dict):
        return [problem for rate, given in value.items() for problem in range_problems(f"model.rates.{rate}", given)]
    allowed = RANGES.get(key)
    if allowed is None or value is None:
        return []
    if isinstance(value, str) and value.lower().lstrip("+-") in (".nan", ".inf"):
        return [f"{key}: {value} is no number; {allowed} is expected"]
    if isinstance(value, dict) or isinstance(value, list) != allowed.listed:
        # A list in place of a number, or a number in place of a list.
        return [f"{key}: {shown(value)}; {allowed} is expected"] if isinstance(value, (list, dict, int, float)) else []
    numbers = [_number(item) for item in value] if isinstance(value, list) else [_number(value)]
    items = value if isinstance(value, list) else [value]
    if none := [
        item for item, number in zip(items, numbers, strict=True) if number is None and isinstance(item, (str, bool))
    ]:
        return [f"{key}: {shown(none[0])} is no number; {allowed} is expected"]
    wrong = [number for number in numbers if number is not None and not allowed.holds(number)]
    if wrong:
        return [f"{key}: {shown(wrong[0])} is out of range; {allowed} is expected"]
    return [f"{key}: the list is empty; {allowed} is expected"] if not numbers and not allowed.empty else []


def _number(value: Any) -> float | None:
    """The number that a value is or is written as; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
