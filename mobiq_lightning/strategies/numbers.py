"""Numbers that a strategy is given, checked with one message."""

from __future__ import annotations

from mobiq_lightning.errors import shown

MOST_BITS = 8
"""Bits of all slices together at most."""
MOST = 1e9
"""No number of a recipe is larger."""


def in_range(name: str, value: float, low: float, high: float = MOST, above: bool = False) -> None:
    """Checks a number that a class of a recipe is given.

    Args:
        name: Name of the argument, for the message.
        value: What was given.
        low: The lowest that can be used.
        high: The highest.
        above: Whether `low` itself is too low.

    Raises:
        ValueError: If it is no number, NaN, or outside.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or (above and value == low):  # NaN is in no range
        raise ValueError(
            f"{name} ({shown(value)}) must be a number {'above' if above else 'of at least'} {low:g} and at most {high:,g}"
        )
