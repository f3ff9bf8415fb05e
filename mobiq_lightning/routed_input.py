"""The routed input: what the linears that read one input share, and who decides how deep its tokens are read."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.errors import BitsError
from mobiq_lightning.packing import depths_of
from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.thresholds import Scope, prefix_scores, threshold_for_budget, with_budget_gradient

TABLE_STEP = 0.25
"""Distance in bits between the budgets whose thresholds are stored."""


class RoutedInput(nn.Module):
    """One distinct input of a block: its router, and how deep its tokens are read at present.

    At present means, first match counts: full precision if `full_precision`; the first `fixed_slices` slices for all
    tokens if that is set; else the gates of `control` if that is set, else those of `router`.

    Args:
        router: Scores the tokens of this input.
        slice_bits: Bits of each slice.
        n_weights: Weights that read this input.
    """

    budgets: Tensor
    layer_thresholds: Tensor
    global_thresholds: Tensor

    def __init__(self, router: Router, slice_bits: tuple[int, ...], n_weights: int) -> None:
        super().__init__()
        self.router = router
        self.slice_bits = slice_bits
        self.n_weights = n_weights
        lowest, highest = self.depths[0], self.depths[-1]
        budgets = torch.linspace(lowest, highest, round((highest - lowest) / TABLE_STEP) + 1)
        self.register_buffer("budgets", budgets)
        self.register_buffer("layer_thresholds", torch.zeros_like(budgets))
        self.register_buffer("global_thresholds", torch.zeros_like(budgets))
        self.full_precision = False
        self.fixed_slices: int | None = None
        self.control: Router | None = None
        self.target_bits: float | None = None
        self.recorded: list[Tensor] | None = None
        self.recorded_scores: list[Tensor] | None = None
        self._last: tuple[weakref.ref[Tensor], Tensor] | None = None
        self._last_gated: Tensor | None = None

    @property
    def depths(self) -> tuple[int, ...]:
        """Bits read by the first 1, 2, ... slices."""
        return depths_of(self.slice_bits)

    def gates(self, x: Tensor) -> Tensor:
        """Gates (..., S) of tokens (..., I), computed once for all linears that are given the same tensor."""
        if torch.compiler.is_compiling():  # the compiler finds the common part by itself and cannot hold references
            return self._gates(x)
        if self._last is None or self._last[0]() is not x:
            self._last, self._last_gated = (weakref.ref(x), self._gates(x)), None
            if self.recorded is not None:
                self.recorded.append(self.bits_of(self._last[1]))
        return self._last[1]

    def gated(self, x: Tensor) -> Tensor:
        """Tokens (..., I) beside themselves once per slice, closed slices as zeros: (..., S * I).

        One product of this with the slices beside each other is the sum over slices, and serves all linears of the input.
        """
        gates = self.gates(x).to(x.dtype)
        if self._last_gated is None:
            self._last_gated = (gates.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
        return self._last_gated

    def forget(self) -> None:
        """Drops what is kept for the last tensor; needed whenever the way to depths changes."""
        self._last = self._last_gated = None

    def set_tables(self, layer: Tensor, pooled: Tensor) -> None:
        """Stores thresholds (budgets,) of both scopes, at which the average depth meets each of `self.budgets`."""
        self.layer_thresholds.copy_(layer)
        self.global_thresholds.copy_(pooled)

    def set_bits(self, bits: float, scope: Scope) -> None:
        """Turns the dial: takes the threshold for `bits`, interpolated between the stored budgets.

        Raises:
            BitsError: If `bits` is outside of what the slices can give.
        """
        lowest, highest = self.depths[0], self.depths[-1]
        if not lowest <= bits <= highest:
            raise BitsError(f"{bits:g} bits asked for; this model runs at {lowest} to {highest} bits per weight")
        self.forget()
        table = self.layer_thresholds if scope == "layer" else self.global_thresholds
        upper = int(torch.searchsorted(self.budgets, bits).clamp(1, self.budgets.numel() - 1))
        low, high = self.budgets[upper - 1], self.budgets[upper]
        threshold = torch.lerp(table[upper - 1], table[upper], (bits - low) / (high - low))
        # At the ends of the range nothing is left to choose, whatever the scores of new text are.
        threshold = torch.full_like(threshold, -torch.inf) if bits == highest else threshold
        threshold = torch.full_like(threshold, torch.inf) if bits == lowest else threshold
        self.router.threshold.copy_(threshold)

    def _gates(self, x: Tensor) -> Tensor:
        router = self.control or self.router
        scores = router.scores(x)
        flat = prefix_scores(scores).flatten(0, -2)
        if self.recorded_scores is not None:
            self.recorded_scores.append(flat.detach())
        if self.target_bits is None:
            return router.gates(scores, router.threshold)
        threshold = threshold_for_budget(flat, self.slice_bits, [self.target_bits])[0]
        if router.training and torch.is_grad_enabled():
            threshold = with_budget_gradient(threshold, flat, self.slice_bits, router.temperature)
        return router.gates(scores, threshold)

    def bits_of(self, gates: Tensor) -> Tensor:
        """Code bits (...) that gates (..., S) read."""
        return gates @ torch.tensor(self.slice_bits, dtype=gates.dtype, device=gates.device)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"{list(self.slice_bits)} bits, {self.n_weights} weights"


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
