"""How deep routed inputs are read within a `with` statement, and what is recorded meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mobiq_lightning.errors import BitsError

if TYPE_CHECKING:
    pass
from mobiq_lightning.nn.routed_input import RoutedInput


@contextmanager
def _with(inputs: Sequence[RoutedInput], attribute: str, values: Sequence[Any]) -> Iterator[None]:
    """Within it, an attribute of each input has another value."""
    before = [getattr(routed, attribute) for routed in inputs]
    for routed, value in zip(inputs, values, strict=True):
        routed.forget()
        setattr(routed, attribute, value)
    try:
        yield
    finally:
        for routed, value in zip(inputs, before, strict=True):
            routed.forget()
            setattr(routed, attribute, value)


def full_precision(inputs: Sequence[RoutedInput]) -> AbstractContextManager[None]:
    """Within it, calibrated linears use their full-precision weights."""
    return _with(inputs, "full_precision", [True] * len(inputs))


def fixed_depth(inputs: Sequence[RoutedInput], bits: int) -> AbstractContextManager[None]:
    """Within it, all tokens read `bits` bits.

    Raises:
        BitsError: If no prefix of the slices has `bits` bits.
    """
    for routed in inputs:
        if bits not in routed.depths:
            raise BitsError(f"no prefix of the slices has {bits} bits; depths are {list(routed.depths)}")
    return _with(inputs, "fixed_slices", [routed.depths.index(bits) + 1 for routed in inputs])


def meet_budget(inputs: Sequence[RoutedInput], bits: float) -> AbstractContextManager[None]:
    """Within it, each input takes the quantile of its current scores as threshold, so that its average is `bits`."""
    return _with(inputs, "target_bits", [bits] * len(inputs))


@contextmanager
def common_threshold(
    inputs: Sequence[RoutedInput], threshold: Tensor, opened: Sequence[Tensor] | None = None
) -> Iterator[None]:
    """Within it, all inputs share one threshold (scalar), with the gradient that it has.

    Args:
        inputs: Of the model.
        threshold: In the space of bounded scores where routers are trained, else of scores.
        opened: For each input, which gates (B, T, S - 1) are open, if that is decided already.
    """
    decided = [None] * len(inputs) if opened is None else opened
    with _with(inputs, "common_threshold", [threshold] * len(inputs)), _with(inputs, "opened", decided):
        yield


@contextmanager
def record_gates(inputs: Sequence[RoutedInput]) -> Iterator[list[list[Tensor]]]:
    """Within it, routed forward passes append the bits of their tokens to the list of their input.

    Yields:
        For each input, a list with one tensor (...) of code bits per forward pass.
    """
    lists: list[list[Tensor]] = [[] for _ in inputs]
    with _with(inputs, "recorded", lists):
        yield lists


@contextmanager
def record_scores(inputs: Sequence[RoutedInput]) -> Iterator[list[list[Tensor]]]:
    """Within it, routed forward passes append the scores of their tokens to the list of their input.

    Yields:
        For each input, a list with one tensor (N, S - 1) of scores under the prefix rule per forward pass.
    """
    lists: list[list[Tensor]] = [[] for _ in inputs]
    with _with(inputs, "recorded_scores", lists):
        yield lists


@contextmanager
def record_live_scores(inputs: Sequence[RoutedInput]) -> Iterator[list[list[Tensor]]]:
    """Within it, as `record_scores`, but the scores have gradients for the routers, even where nothing else has any.

    Tokens count as given: a router's scores have no gradient for what the blocks before made.
    """
    lists: list[list[Tensor]] = [[] for _ in inputs]
    with _with(inputs, "live_scores", lists):
        yield lists
