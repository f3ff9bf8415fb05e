"""The dial: how many bits the inputs of a model read, and how many they have read."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mobiq_lightning.errors import BitsError, shown
from mobiq_lightning.nn import ReadState, RoutedInput
from mobiq_lightning.runtime.counting import BitCounter, BitsUsed
from mobiq_lightning.strategies.thresholds import Scope

Budget = float | Sequence[float] | Tensor
"""Bits per weight: one for all rows of a batch, or one for each."""


_EXPECTED = "give one figure, or one for each row of the batch"


def turning_order(sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """In which order inputs move from one stored budget to the next as the dial is turned.

    Inputs that follow each other in it lie far apart in the model, so that every part of the model keeps pace.

    Args:
        sizes: Number of weights that each input feeds, in the order of the model.

    Returns:
        For each input, the part of the way from one budget to the next at which it begins to move, and the part that it takes,
        which is its part of all weights; (inputs,) float64 each.
    """
    golden = (math.sqrt(5) - 1) / 2
    order = sorted(range(len(sizes)), key=lambda position: (position * golden) % 1)
    share = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    start = torch.zeros_like(share)
    start[order] = share[order].cumsum(0) - share[order]
    return start, share


class Dial:
    """Sets the budget of a model's inputs and counts what they read.

    Thresholds are found on the host from a copy of the tables that is made here, and copied in place to where the routers
    are: turning the dial waits for no device, and nothing that is compiled or captured has to be made anew.

    Args:
        inputs: The routed inputs of the model, their tables filled.
        scope: Threshold table that is used unless another is asked for, ``layer`` or ``global``.
        overhead_bits: Bits per weight of scales and biases, or of tables.
        router_bits: Bits per weight of the routers.
        sliced_part: Part of the weights of the matrices in blocks that is sliced; the bits above are per weight of them all.
    """

    def __init__(
        self,
        inputs: Sequence[RoutedInput],
        scope: Scope = "layer",
        overhead_bits: float = 0.0,
        router_bits: float = 0.0,
        sliced_part: float = 1.0,
    ) -> None:
        self.inputs = list(inputs)
        self.scope: Scope = scope
        self.overhead_bits, self.router_bits, self.sliced_part = overhead_bits, router_bits, sliced_part
        first = self.inputs[0]
        self.lowest, self.highest = float(first.depths[0]), float(first.depths[-1])
        self._step = first.budget_step
        row = len(first.slice_bits) - 1
        self._tables = {
            "layer": torch.stack([routed.layer_thresholds[row].cpu() for routed in self.inputs]),
            "global": torch.stack([routed.global_thresholds[row].cpu() for routed in self.inputs]),
        }
        self._start, self._share = turning_order([routed.n_weights for routed in self.inputs])
        self._budget: Tensor | None = None
        self._scope_now = scope
        self._generating = False
        self._one_at_a_time = threading.RLock()
        self.counter = BitCounter(self.inputs)
        self._replaced = 0
        self.state = ReadState()
        for routed in self.inputs:
            routed.state = self.state

    @property
    def budget(self) -> float | Tensor | None:
        """Average bits asked for: one figure, or (B,) with one for each row; None if the dial was never turned."""
        return self._budget if self._budget is None or self.state.per_row else float(self._budget)

    @property
    def replaced(self) -> int:
        """Number of times that tensors of thresholds or counts were replaced, which makes captured graphs void."""
        return self._replaced + self.counter.replaced

    def set_bits(self, bits: Budget, scope: Scope | None = None) -> None:
        """Turns the dial to a budget. Outside of a generation, counting begins anew.

        Args:
            bits: Average bits per weight, one figure for all rows, or (B,) with one for each row of the batches to
                come.
            scope: Threshold table, ``layer`` or ``global``; by default that of the dial.

        Raises:
            BitsError: If a budget is no number or outside of what the stored slices can give, or there is no such table.
        """
        self._turn(self._checked(bits), self._known(scope))
        if not self._generating:
            self.reset()

    @contextmanager
    def bits(self, bits: Budget, scope: Scope | None = None) -> Iterator[None]:
        """Context in which the dial stands at `bits`; afterwards it stands where it did, and what was counted is kept.

        What is read in a generation or another context within it counts in both.

        Args:
            bits: Average bits per weight, one figure for all rows, or (B,) with one for each row of the batches to
                come.
            scope: Threshold table, ``layer`` or ``global``; by default that of the dial.

        Raises:
            BitsError: If a budget is outside of what the stored slices can give.
        """
        budgets, before, last_scope = self._checked(bits), self._budget, self._scope_now
        if self._generating:  # which goes on counting
            self._turn(budgets, self._known(scope))
            try:
                yield
            finally:
                self._turn_back(before, last_scope)
            return
        with self._counted(before, last_scope):
            self._turn(budgets, self._known(scope))
            self.reset()
            yield

    @contextmanager
    def generation(self, bits: Budget | None, batch: int | None) -> Iterator[None]:
        """Context in which a batch is continued token by token: counting goes on while the dial turns.

        Of several threads that enter it one goes on at a time, so that none reads at the bits of another.

        Args:
            bits: Budget of this generation, after which the dial goes back to where it stood; by default where it
                stands.
            batch: Rows of the batch, before beams or samples multiply them; None if unknown.

        Raises:
            BitsError: If a budget is out of range, or there are not as many budgets as rows.
        """
        with self._one_at_a_time:
            before, last_scope = self._budget, self._scope_now
            asked = self._budget if bits is None else self._checked(bits)
            if asked is not None and asked.ndim == 1 and len(asked) != batch:
                raise BitsError(
                    f"{len(asked)} budgets for a batch of {batch} rows; give one for each row, or one for all"
                )
            if self._generating:  # as a model does that is its own assistant: one generation
                if bits is not None and asked is not None:
                    self._turn(asked, last_scope)
                try:
                    yield
                finally:
                    self._turn_back(before if bits is not None else None, last_scope)
                return
            with self._counted(before if bits is not None else None, last_scope):
                if bits is not None and asked is not None:
                    self._turn(asked, last_scope)
                self.reset()
                self._generating = self.state.expanded = True
                try:
                    yield
                finally:
                    self._generating = self.state.expanded = False

    def reset(self) -> None:
        """Sets the counts of what was read to 0."""
        self.counter.reset(self._rows())

    def bits_used(self, names: Sequence[str] = ()) -> BitsUsed:
        """Reports the bits that were read since counting began, or in the generation or `bits` context that ended last.

        Args:
            names: Names of the inputs, in their order, if their own averages are wanted.

        Raises:
            BitsError: If no tokens were read.
        """
        return self.counter.used(self.overhead_bits + self.router_bits, self.sliced_part, names)

    def thresholds(self, budgets: Tensor, scope: Scope) -> Tensor:
        """Thresholds for R budgets (R,) in average bits: (inputs, R), on the host.

        Between two stored budgets some inputs are at the lower one and the others at the upper one, by as much of the weights
        as the budget lies between them; one input is in between. Thresholds of all inputs in between would not do: scores have
        gaps where a depth ends, in which a threshold moves without effect.
        """
        table, last = self._tables[scope], round((self.highest - self.lowest) / self._step)
        position = (budgets - self.lowest) / self._step
        lower = position.floor().long().clamp(0, max(0, last - 1))
        upper = (lower + 1).clamp(max=last)
        part = ((position - lower) - self._start[:, None]).div(self._share[:, None]).clamp(0, 1)
        values = torch.lerp(table[:, lower], table[:, upper], part.float())
        # At the ends of the range nothing is left to choose, whatever the scores of new text are.
        values[(lower == 0) & (part == 0)] = torch.inf
        values[(upper == last) & (part == 1)] = -torch.inf
        return values

    @contextmanager
    def _counted(self, before: Tensor | None, scope: Scope) -> Iterator[None]:
        """Context in which reading is counted by itself; then the dial turns back to `before` unless that is None."""
        with self.counter.context(self._rows):
            try:
                yield
            finally:
                self._turn_back(before, scope)

    def _rows(self) -> int:
        """Rows of a batch that are counted by themselves."""
        return len(self._budget) if self._budget is not None and self.state.per_row else 1

    def _turn_back(self, before: Tensor | None, scope: Scope) -> None:
        if before is not None:
            self._turn(before, scope)

    def _known(self, scope: Scope | None) -> Scope:
        """The scope to use; raises `BitsError` if there is no such table."""
        if scope is not None and scope not in self._tables:
            raise BitsError(f"scope {shown(scope)}; {' or '.join(self._tables)} is expected")
        return scope or self.scope

    def _checked(self, bits: Budget) -> Tensor:
        """Budgets as a tensor, () or (R,) float64, on the host; raises `BitsError` if one is out of range."""
        if isinstance(bits, (str, bytes, bool)):
            raise BitsError(f"bits {shown(bits)}; {_EXPECTED}")
        try:
            budgets = torch.as_tensor(bits, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # None, words, a list of lists, 10**400
            raise BitsError(f"bits {shown(bits)}; {_EXPECTED}") from error
        if budgets.ndim > 1 or budgets.numel() == 0:
            raise BitsError(f"bits of shape {tuple(budgets.shape)}; {_EXPECTED}")
        inside = (budgets >= self.lowest) & (budgets <= self.highest)
        if not bool(inside.all()):
            given = ", ".join(f"{b:g}" for b in budgets[~inside].reshape(-1).tolist())
            raise BitsError(
                f"{given} bits asked for; this model holds {self.lowest:g} to {self.highest:g} bits per weight"
            )
        return budgets

    def _turn(self, budgets: Tensor, scope: Scope) -> None:
        self._budget, self._scope_now, self.state.per_row = budgets, scope, budgets.ndim == 1
        shape = (len(budgets), 1, 1) if budgets.ndim == 1 else ()
        by_device: dict[torch.device, list[int]] = {}
        for row, routed in enumerate(self.inputs):
            routed.forget()
            if routed.router.threshold.shape != shape or routed.router.threshold.is_inference():
                with torch.inference_mode(False):  # or the dial could not be turned outside of it
                    routed.router.threshold = routed.router.threshold.new_empty(shape)
                self._replaced += 1
            by_device.setdefault(routed.router.threshold.device, []).append(row)
        values = self.thresholds(budgets.reshape(-1), scope)
        for device, rows in by_device.items():
            targets = [self.inputs[row].router.threshold for row in rows]
            moved = values[rows].to(device, non_blocking=True)
            torch._foreach_copy_(targets, [value.view(shape) for value in moved])

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, which are not in the middle of a generation."""
        return {**self.__dict__, "_one_at_a_time": None, "_generating": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._one_at_a_time = threading.RLock()
