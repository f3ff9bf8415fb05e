"""Contexts for `with` statements in which routed inputs are read in another way, or are observed; afterwards as before.

`read_as` changes how tokens are read, `observed_by` adds observers, `transformed_by` exchanges what linears read instead
of the tokens; the other functions cover common cases of the first two. Of nested statements for the same input the
innermost decides alone how tokens are read, and all of them observe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor

from mobiq_lightning.errors import BitsError
from mobiq_lightning.nn.observers import BitsRecorder, LiveScoreRecorder, Observer, ScoreRecorder
from mobiq_lightning.nn.reading import CommonThreshold, FixedSlices, FullPrecision, MeetBudget, Reading, Routed
from mobiq_lightning.nn.routed_input import RoutedInput
from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.transform_base import InputTransform


@contextmanager
def read_as(inputs: Sequence[RoutedInput], readings: Sequence[Reading]) -> Iterator[None]:
    """Context in which the tokens of each input are read as given; afterwards they are read as before.

    What the inputs keep of the last tensor is forgotten at both ends.

    Args:
        inputs: Routed inputs of a model.
        readings: How tokens are read, one reading for each input.
    """
    before = [routed.reading for routed in inputs]
    try:
        _set_readings(inputs, readings)
        yield
    finally:
        _set_readings(inputs, before)


@contextmanager
def observed_by(inputs: Sequence[RoutedInput], observers: Sequence[Observer]) -> Iterator[None]:
    """Context in which each input tells one more observer what it decides.

    Args:
        inputs: Routed inputs of a model.
        observers: Observers to add, one for each input.
    """
    before = [routed.observers for routed in inputs]
    try:
        _set_observers(inputs, [(*known, new) for known, new in zip(before, observers, strict=True)])
        yield
    finally:
        _set_observers(inputs, before)


@contextmanager
def transformed_by(inputs: Sequence[RoutedInput], transforms: Sequence[InputTransform | None]) -> Iterator[None]:
    """Context in which the linears of each input read what another transform makes of the tokens.

    Args:
        inputs: Routed inputs of a model that is being calibrated.
        transforms: Transforms to read through, one for each input; None where tokens are read as they are.
    """
    before = [routed.transform for routed in inputs]
    try:
        _set_transforms(inputs, transforms)
        yield
    finally:
        _set_transforms(inputs, before)


def full_precision(inputs: Sequence[RoutedInput]) -> AbstractContextManager[None]:
    """Context in which linears that are being calibrated use their full-precision weights.

    Linears of a finished model hold no such weights: their forward pass raises `BitsError` in this context.
    """
    return read_as(inputs, [FullPrecision()] * len(inputs))


def fixed_depth(inputs: Sequence[RoutedInput], bits: int) -> AbstractContextManager[None]:
    """Context in which all tokens read `bits` bits of each weight.

    Raises:
        BitsError: If no prefix of the slices has `bits` bits.
    """
    for routed in inputs:
        if bits not in routed.depths:
            raise BitsError(f"no prefix of the slices has {bits} bits; depths are {list(routed.depths)}")
    return read_as(inputs, [FixedSlices(routed.depths.index(bits) + 1) for routed in inputs])


def meet_budget(inputs: Sequence[RoutedInput], bits: float, together: bool = False) -> AbstractContextManager[None]:
    """Context in which each input takes a quantile of its scores as threshold, so that its average is `bits`.

    Args:
        inputs: Routed inputs of a model.
        bits: Average bits per weight.
        together: Whether scores are those of all processes that train together; each must then run the inputs.
    """
    return read_as(inputs, [Routed(MeetBudget(bits, together))] * len(inputs))


def common_threshold(
    inputs: Sequence[RoutedInput], threshold: Tensor, opened: Sequence[Tensor] | None = None
) -> AbstractContextManager[None]:
    """Context in which all inputs share one threshold (scalar), with the gradient that it has.

    Args:
        inputs: Routed inputs of a model.
        threshold: Scalar threshold, for bounded scores (`Router.bounded`) where routers are trained, else for scores.
        opened: (B, T, S - 1) bool for each input, which gates are open, if that is decided already.
    """
    decided = [None] * len(inputs) if opened is None else opened
    return read_as(inputs, [Routed(CommonThreshold(threshold, gates)) for gates in decided])


def routed_by(inputs: Sequence[RoutedInput], routers: Sequence[Router]) -> AbstractContextManager[None]:
    """Context in which another router decides how deep the tokens of each input are read, at that router's threshold.

    Args:
        inputs: Routed inputs of a model.
        routers: Routers to ask, one for each input, on its device; they do not become part of the model.
    """
    return read_as(inputs, [Routed(router=router) for router in routers])


@contextmanager
def record_gates(inputs: Sequence[RoutedInput]) -> Iterator[list[list[Tensor]]]:
    """Context in which routed forward passes record the bits that their tokens read.

    Yields:
        For each input, a list that grows by one tensor (...) of code bits per forward pass.
    """
    recorders = [BitsRecorder() for _ in inputs]
    with observed_by(inputs, recorders):
        yield [recorder.records for recorder in recorders]


@contextmanager
def record_scores(inputs: Sequence[RoutedInput]) -> Iterator[list[list[Tensor]]]:
    """Context in which routed forward passes record the scores of their tokens, without gradients.

    Yields:
        For each input, a list that grows by one tensor (N, S - 1) of scores under the prefix rule per forward pass.
    """
    recorders = [ScoreRecorder() for _ in inputs]
    with observed_by(inputs, recorders):
        yield [recorder.records for recorder in recorders]


@contextmanager
def record_live_scores(inputs: Sequence[RoutedInput]) -> Iterator[list[list[Tensor]]]:
    """Context in which routed forward passes record the scores of their tokens, with gradients for the routers.

    The scores have these gradients even where nothing else has any. They have none for the tokens, so that a router is
    not trained through the blocks before it.

    Yields:
        For each input, a list that grows by one tensor (N, S - 1) of scores under the prefix rule per forward pass.
    """
    recorders = [LiveScoreRecorder() for _ in inputs]
    with observed_by(inputs, recorders):
        yield [recorder.records for recorder in recorders]


def _set_readings(inputs: Sequence[RoutedInput], readings: Sequence[Reading]) -> None:
    for routed, reading in zip(inputs, readings, strict=True):
        routed.forget()
        routed.reading = reading


def _set_observers(inputs: Sequence[RoutedInput], observers: Sequence[tuple[Observer, ...]]) -> None:
    for routed, told in zip(inputs, observers, strict=True):
        routed.forget()
        routed.observers = told


def _set_transforms(inputs: Sequence[RoutedInput], transforms: Sequence[InputTransform | None]) -> None:
    for routed, transform in zip(inputs, transforms, strict=True):
        routed.forget()
        routed.transform = transform
