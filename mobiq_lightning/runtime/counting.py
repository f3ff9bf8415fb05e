"""Counts the bits that the inputs of a model read: since the dial was turned, and in contexts that may lie in each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mobiq_lightning.errors import BitsError
from mobiq_lightning.nn import RoutedInput

Counts = list[tuple[Tensor, Tensor]]
"""For each input, the bits and the tokens that were read, (R,) int64 each."""


@dataclass(frozen=True)
class BitsUsed:
    """Measured number of bits that a model has read since counting began.

    Args:
        code_bits: Bits of codes read per weight, mean over tokens, weighted by parameters over inputs.
        all_in_bits: Code bits with those of scales and biases, of the routers, and of what of the matrices in blocks is not
            sliced, per weight of them all.
        n_tokens: Number of tokens that were read; what an attention mask, in whatever form, marks as padding is not counted.
        per_row: Code bits of each row, if rows had budgets of their own.
        per_layer: Code bits of each input by name, if asked for.
    """

    code_bits: float
    all_in_bits: float
    n_tokens: int
    per_row: list[float] = field(default_factory=list)
    per_layer: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class _Context:
    """A context in which reading is counted: what was counted in it beside what the inputs hold; None for nothing."""

    counts: Counts | None = None


class BitCounter:
    """Counts what the inputs of a model read.

    Args:
        inputs: The routed inputs of the model, which hold the counts since `reset`.
    """

    def __init__(self, inputs: Sequence[RoutedInput]) -> None:
        self.inputs = list(inputs)
        self.replaced = 0
        """Number of times that tensors of counts were replaced, which makes captured graphs void."""
        self._contexts: list[_Context] = []
        self._kept: Counts | None = None

    def reset(self, rows: int) -> None:
        """Begins anew within the current context, for batches of so many rows that are counted by themselves."""
        for context in self._contexts[-1:]:
            context.counts = None
        self._clear(rows)

    @contextmanager
    def context(self, rows_after: Callable[[], int]) -> Iterator[None]:
        """Context that counts for itself and for the one that it is in; `used` reports it until something else is read.

        Args:
            rows_after: Function that is called at its end, and says how many rows are counted by themselves from then on.
        """
        outer, own = self._contexts[-1:], _Context()
        for context in outer:
            context.counts = _sum(context.counts, self._counts())
        self._contexts.append(own)
        try:
            yield
        finally:
            counts = _sum(own.counts, self._counts())
            self._contexts.remove(own)
            for context in outer:
                context.counts = _sum(context.counts, counts)
            self._clear(rows_after())
            self._kept = counts

    def used(self, beside_bits: float, sliced_part: float, names: Sequence[str] = ()) -> BitsUsed:
        """Reports what was read since counting began, or in the context that ended last.

        Args:
            beside_bits: Bits per weight of all that is stored beside codes.
            sliced_part: Part of these weights that is sliced.
            names: Names of the inputs, in their order, if their own averages are wanted.

        Raises:
            BitsError: If no tokens were read.
        """
        counts = self._counts()
        if not _any(counts) and self._kept is not None:
            counts = self._kept
        elif self._contexts:
            counts = _sum(self._contexts[-1].counts, counts)
        tokens = torch.stack([count[1].cpu() for count in counts]).double()  # (inputs, R)
        if not bool((tokens.sum(1) > 0).all()):
            raise BitsError("no tokens were read since the dial was turned; run the model, then ask what it used")
        read = torch.stack([count[0].cpu() for count in counts]).double()
        sizes = torch.tensor([float(routed.n_weights) for routed in self.inputs], dtype=torch.float64)
        per_input = read.sum(1) / tokens.sum(1)
        code = float((per_input * sizes).sum() / sizes.sum())
        per_row = (read / tokens.clamp_min(1) * sizes[:, None]).sum(0) / sizes.sum()
        return BitsUsed(
            code,
            code * sliced_part + beside_bits,
            int(tokens[0].sum()),
            per_row.tolist() if len(per_row) > 1 else [],
            dict(zip(names, per_input.tolist(), strict=True)) if names else {},
        )

    def _clear(self, rows: int) -> None:
        self._kept = None
        self.replaced += sum(routed.reset_count(rows) for routed in self.inputs)

    def _counts(self) -> Counts:
        return [(routed.bits_read.clone(), routed.tokens_read.clone()) for routed in self.inputs]


def _any(counts: Counts) -> bool:
    return any(bool(tokens.any()) for _, tokens in counts)


def _sum(first: Counts | None, second: Counts) -> Counts:
    """Both counts together; rows are added up, as they need not be the same."""
    if first is None or not _any(first):
        return second
    if not _any(second):
        return first
    return [
        (a[0].sum(0, keepdim=True) + b[0].sum(0, keepdim=True), a[1].sum(0, keepdim=True) + b[1].sum(0, keepdim=True))
        for a, b in zip(first, second, strict=True)
    ]
