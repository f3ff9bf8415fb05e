"""Makes the routed input that several linears of a block share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mobiq_lightning.nn.routed_input import BUDGET_STEP, RoutedInput
from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.transform_base import InputTransform


def make_shared_input(
    linears: Sequence[Any],
    slice_bits: tuple[int, ...],
    router: Callable[[int, int], Router],
    transform: Callable[[int], InputTransform | None],
    max_bits: int | None = None,
    budget_step: float = BUDGET_STEP,
    read: float = 1.0,
) -> RoutedInput:
    """Makes the routed input of linears that read the same tokens.

    Args:
        linears: Linears of (O, I) weights; the first one reads the input itself, and so do others, but for the second linears
            of experts.
        slice_bits: Bits of each slice.
        router: Factory that makes the router from (I, number of slices).
        transform: Factory that makes the transform of the input from I, or gives None for none.
        max_bits: Depth in bits up to which slices are held; None for all.
        budget_step: Distance in bits between the budgets whose thresholds are stored.
        read: The part of their weights that a token reads.

    Raises:
        BitsError: If no prefix of the slices has `max_bits` bits.
    """
    in_features = linears[0].in_features
    n_weights = round(read * sum(linear.weight.numel() for linear in linears))
    of_input = transform(in_features)
    return RoutedInput(router(in_features, len(slice_bits)), slice_bits, n_weights, max_bits, of_input, budget_step)
