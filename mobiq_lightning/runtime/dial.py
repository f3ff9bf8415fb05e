"""The dial: how many bits the inputs of a model read, and how many they have read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mobiq_lightning.errors import BitsError, shown
from mobiq_lightning.nn import TABLE_STEP, ReadState, RoutedInput
from mobiq_lightning.strategies.thresholds import Scope

Budget = float | Sequence[float] | Tensor
"""Bits per weight: one for all rows of a batch, or one for each."""


_EXPECTED = "give one figure, or one for each row of the batch"


@dataclass(frozen=True)
class BitsUsed:
    """Measured number of bits that a model has read since counting began.

    Args:
        code_bits: Bits of codes read per weight, mean over tokens, weighted by parameters over inputs.
        all_in_bits: Code bits with those of scales and biases and of the routers, per weight.
        n_tokens: Number of tokens that were read; what an attention mask, in whatever form, marks as padding is not counted.
        per_row: Code bits of each row, if rows had budgets of their own.
        per_layer: Code bits of each input by name, if asked for.
    """

    code_bits: float
    all_in_bits: float
    n_tokens: int
    per_row: list[float] = field(default_factory=list)
    per_layer: dict[str, float] = field(default_factory=dict)


class Dial:
    """Sets the budget of a model's inputs and counts what they read.

    Thresholds are interpolated on the host from a copy of the tables that is made here, and copied in place to where the
    routers are: turning the dial waits for no device, and nothing that is compiled or captured has to be made anew.

    Args:
        inputs: The routed inputs of the model, their tables filled.
        scope: Threshold table that is used unless another is asked for, ``layer`` or ``global``.
        overhead_bits: Bits per weight of scales and biases, or of tables.
        router_bits: Bits per weight of the routers.
    """

    def __init__(
        self,
        inputs: Sequence[RoutedInput],
        scope: Scope = "layer",
        overhead_bits: float = 0.0,
        router_bits: float = 0.0,
    ) -> None:
        self.inputs = list(inputs)
        self.scope: Scope = scope
        self.overhead_bits, self.router_bits = overhead_bits, router_bits
        first = self.inputs[0]
        self.lowest, self.highest = float(first.depths[0]), float(first.depths[-1])
        row = len(first.slice_bits) - 1
        self._tables = {
            "layer": torch.stack([routed.layer_thresholds[row].cpu() for routed in self.inputs]),
            "global": torch.stack([routed.global_thresholds[row].cpu() for routed in self.inputs]),
        }
        self._budget: Tensor | None = None
        self._scope_now = scope
        self._generating = False
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        self.replaced = 0
        """Number of times that tensors of thresholds or counts were replaced, which makes captured graphs void."""
        self.state = ReadState()
        for routed in self.inputs:
            routed.state = self.state

    @property
    def budget(self) -> float | Tensor | None:
        """Average bits asked for: one figure, or (B,) with one for each row; None if the dial was never turned."""
        return self._budget if self._budget is None or self.state.per_row else float(self._budget)

    def set_bits(self, bits: Budget, scope: Scope | None = None) -> None:
        """Turns the dial to a budget. Outside of a generation, counting begins anew.

        Args:
            bits: Average bits per weight, one figure for all rows, or (B,) with one for each row of the batches to
                come.
            scope: Threshold table, ``layer`` or ``global``; by default that of the dial.

        Raises:
            BitsError: If a budget is no number or outside of what the stored slices can give, or there is no such table.
        """
        if scope is not None and scope not in self._tables:
            raise BitsError(f"scope {shown(scope)}; {' or '.join(self._tables)} is expected")
        self._turn(self._checked(bits), scope or self.scope)
        if not self._generating:
            self.reset()

    @contextmanager
    def bits(self, bits: Budget, scope: Scope | None = None) -> Iterator[None]:
        """Context in which the dial stands at `bits`; afterwards it stands where it did, and what was counted is kept.

        Args:
            bits: Average bits per weight, one figure for all rows, or (B,) with one for each row of the batches to
                come.
            scope: Threshold table, ``layer`` or ``global``; by default that of the dial.

        Raises:
            BitsError: If a budget is outside of what the stored slices can give.
        """
        before, last_scope = self._budget, self._scope_now
        self.set_bits(bits, scope)
        try:
            yield
        finally:
            self._keep_count(before, last_scope)

    @contextmanager
    def generation(self, bits: Budget | None, batch: int | None) -> Iterator[None]:
        """Context in which a batch is continued token by token: counting goes on while the dial turns.

        Args:
            bits: Budget of this generation, after which the dial goes back to where it stood; by default where it
                stands.
            batch: Rows of the batch, before beams or samples multiply them; None if unknown.

        Raises:
            BitsError: If a budget is out of range, or there are not as many budgets as rows.
        """
        before, last_scope = self._budget, self._scope_now
        asked = self._budget if bits is None else self._checked(bits)
        if asked is not None and asked.ndim == 1 and len(asked) != batch:
            raise BitsError(f"{len(asked)} budgets for a batch of {batch} rows; give one for each row, or one for all")
        if bits is not None and asked is not None:
            self._turn(asked, last_scope)
        self.reset()
        self._generating = self.state.expanded = True
        try:
            yield
        finally:
            self._generating = self.state.expanded = False
            self._keep_count(before if bits is not None else None, last_scope)

    def reset(self) -> None:
        """Sets the counts of what was read to 0."""
        self._kept = None
        rows = len(self._budget) if self._budget is not None and self.state.per_row else 1
        self.replaced += sum(routed.reset_count(rows) for routed in self.inputs)

    def bits_used(self, names: Sequence[str] = ()) -> BitsUsed:
        """Reports the bits that were read since counting began, or in the generation or `bits` context that ended last.

        Args:
            names: Names of the inputs, in their order, if their own averages are wanted.

        Raises:
            BitsError: If no tokens were read.
        """
        counts = [(routed.bits_read, routed.tokens_read) for routed in self.inputs]
        tokens = torch.stack([count[1].cpu() for count in counts]).double()  # (inputs, R)
        if not bool(tokens.any()) and self._kept is not None:
            counts = self._kept
            tokens = torch.stack([count[1].cpu() for count in counts]).double()
        if not bool((tokens.sum(1) > 0).all()):
            raise BitsError("no tokens were read since the dial was turned; run the model, then ask what it used")
        read = torch.stack([count[0].cpu() for count in counts]).double()
        sizes = torch.tensor([float(routed.n_weights) for routed in self.inputs], dtype=torch.float64)
        per_input = read.sum(1) / tokens.sum(1)
        code = float((per_input * sizes).sum() / sizes.sum())
        per_row = (read / tokens.clamp_min(1) * sizes[:, None]).sum(0) / sizes.sum()
        return BitsUsed(
            code,
            code + self.overhead_bits + self.router_bits,
            int(tokens[0].sum()),
            per_row.tolist() if len(per_row) > 1 else [],
            dict(zip(names, per_input.tolist(), strict=True)) if names else {},
        )

    def thresholds(self, budgets: Tensor, scope: Scope) -> Tensor:
        """Interpolates the stored thresholds for R budgets (R,) in average bits: (inputs, R), on the host."""
        table = self._tables[scope]
        position = (budgets - self.lowest) / TABLE_STEP
        lower = position.floor().long().clamp(0, max(0, table.shape[1] - 2))
        upper = (lower + 1).clamp(max=table.shape[1] - 1)
        values = torch.lerp(table[:, lower], table[:, upper], (position - lower).float())
        # At the ends of the range nothing is left to choose, whatever the scores of new text are.
        values[:, budgets == self.lowest] = torch.inf
        values[:, budgets == self.highest] = -torch.inf
        return values

    def _keep_count(self, before: Tensor | None, scope: Scope) -> None:
        """Sets aside what was counted, turns the dial back to `before` unless that is None, and begins counting anew."""
        if self._generating:  # a context within a generation: the generation goes on counting
            if before is not None:
                self._turn(before, scope)
            return
        kept = [(routed.bits_read.clone(), routed.tokens_read.clone()) for routed in self.inputs]
        if before is not None:
            self._turn(before, scope)
        self.reset()
        self._kept = kept

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
                self.replaced += 1
            by_device.setdefault(routed.router.threshold.device, []).append(row)
        values = self.thresholds(budgets.reshape(-1), scope)
        for device, rows in by_device.items():
            targets = [self.inputs[row].router.threshold for row in rows]
            moved = values[rows].to(device, non_blocking=True)
            torch._foreach_copy_(targets, [value.view(shape) for value in moved])
