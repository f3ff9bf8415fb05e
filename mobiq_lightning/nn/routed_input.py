"""The routed input: what the linears that read one input share, and who decides how deep its tokens are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mobiq_lightning.errors import BitsError
from mobiq_lightning.nn.observers import Observer
from mobiq_lightning.nn.reading import CommonThreshold, MeetBudget, Reading, Routed
from mobiq_lightning.packing import BUDGETS, THRESHOLDS, depths_of
from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.thresholds import prefix_scores, threshold_for_budget, with_budget_gradient
from mobiq_lightning.strategies.together import gathered
from mobiq_lightning.strategies.transform_base import InputTransform
from mobiq_lightning.tensor_memo import TensorMemo

if TYPE_CHECKING:
    from mobiq_lightning.nn.fused_products import FusedProducts

BUDGET_STEP = 0.0625
"""Distance in bits between the budgets whose thresholds a calibration finds."""
RUN_STEP = 0.25
"""Distance between the budgets at which a calibration runs the model for that, and looks at routers, in bits of a slice of one
bit: between two depths there are as many runs however wide the slice is."""


def held_slices(slice_bits: tuple[int, ...], max_bits: int | None) -> tuple[int, ...]:
    """Gives the bits of the slices that a model holds if it has only the first `max_bits` bits of each weight.

    Args:
        slice_bits: Bits of all slices, coarsest first.
        max_bits: Depth in bits up to which slices are held; None for all.

    Raises:
        BitsError: If no prefix of the slices has `max_bits` bits.
    """
    depths = depths_of(slice_bits)
    if max_bits is None:
        return slice_bits
    if max_bits not in depths:
        raise BitsError(f"max_bits ({max_bits:g}) is no prefix of the slices; give one of {list(depths)}")
    return slice_bits[: depths.index(max_bits) + 1]


def run_budgets(slice_bits: tuple[int, ...]) -> list[float]:
    """Budgets in bits, ascending, at which a calibration runs the model to find thresholds, and looks at routers."""
    between = [part * RUN_STEP for part in range(round(1 / RUN_STEP))]
    below = zip(depths_of(slice_bits), slice_bits[1:], strict=False)
    return [depth + part * bits for depth, bits in below for part in between] + [float(sum(slice_bits))]


def without_casts(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wraps what `nn.Module.to` does to a tensor such that it moves the tensor but leaves its dtype.

    Scales are exact in bfloat16 alone, and scores that tell tokens apart in float32 may be equal in half precision.
    """

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


@dataclass
class ReadState:
    """What the inputs of one model share while it runs.

    Args:
        per_row: Whether every row of a batch has a threshold of its own.
        expanded: Whether a batch may hold each row several times in a row, as beam search makes them.
        mask: (B, T) which tokens of the current forward pass are no padding; None if all count.
        shape: (B, T) of the current forward pass; blocks with experts flatten their tokens. None if it is not known.
    """

    per_row: bool = False
    expanded: bool = False
    mask: Tensor | None = None
    shape: tuple[int, int] | None = None


class RoutedInput(nn.Module):
    """One distinct input of a block: its router, and how deep its tokens are read at present.

    `reading` says how deep; `observers` are told what a routed reading decides. Both are set by context managers such
    as `fixed_depth` and `record_gates`, which also `forget` what was decided before.

    Args:
        router: Router that scores the tokens of this input, built for all of `slice_bits`.
        slice_bits: Bits of each slice.
        n_weights: Number of weights that a token of this input reads: of experts, those of the ones that it goes to.
        max_bits: Depth in bits up to which slices are held; by default all.
        transform: Transform of the tokens for the linears, while the router sees the tokens themselves; by default
            none.
        budget_step: Distance in bits between the budgets whose thresholds are stored.
    """

    budgets: Tensor
    layer_thresholds: Tensor
    global_thresholds: Tensor
    bits_read: Tensor
    tokens_read: Tensor

    def __init__(
        self,
        router: Router,
        slice_bits: tuple[int, ...],
        n_weights: int,
        max_bits: int | None = None,
        transform: InputTransform | None = None,
        budget_step: float = BUDGET_STEP,
    ) -> None:
        super().__init__()
        self.router = router
        self.transform = transform
        self.slice_bits = held_slices(slice_bits, max_bits)
        self.n_weights = n_weights
        lowest, highest = slice_bits[0], sum(slice_bits)
        budgets = torch.linspace(lowest, highest, round((highest - lowest) / budget_step) + 1)
        self.register_buffer("budgets", budgets)
        # Row k: thresholds for a model that holds only the first k + 1 slices.
        self.register_buffer("layer_thresholds", torch.zeros(len(slice_bits), len(budgets)))
        self.register_buffer("global_thresholds", torch.zeros(len(slice_bits), len(budgets)))
        self.register_buffer("bits_read", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.register_buffer("tokens_read", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.reading: Reading = Routed()
        self.observers: tuple[Observer, ...] = ()
        self.state = ReadState()
        self.kernel: FusedProducts[Any] | None = None
        self._gates = TensorMemo[Tensor]()
        self._gated = TensorMemo[Tensor]()
        self._transformed = TensorMemo[Tensor]()

    @property
    def budget_step(self) -> float:
        """Distance in bits between the budgets whose thresholds are stored; `RUN_STEP` if there is but one."""
        return float(self.budgets[1] - self.budgets[0]) if len(self.budgets) > 1 else RUN_STEP

    @property
    def run_columns(self) -> list[int]:
        """Columns of the tables for all depths and, between two of them, for budgets `RUN_STEP` of the slice apart."""
        budgets = run_budgets(self.slice_bits)
        return sorted({round((bits - self.slice_bits[0]) / self.budget_step) for bits in budgets})

    @property
    def depths(self) -> tuple[int, ...]:
        """Bits read by the first 1, 2, ... slices that are held."""
        return depths_of(self.slice_bits)

    @property
    def reads_plainly(self) -> bool:
        """Whether tokens are read as in a served model, at the router's own threshold, and no observer is told."""
        return isinstance(self.reading, Routed) and self.reading.is_plain and not self.observers

    def gates(self, x: Tensor) -> Tensor:
        """Decides the gates (..., S) of tokens `x` (..., I), once for all linears that are given the same tensor.

        Raises:
            RuntimeError: If the input is not routed at present, so that there are no gates to decide.
        """
        return self._gates.get(x, lambda: self._decide(x))

    def take_gates(self, x: Tensor, gates: Tensor) -> None:
        """Takes over gates (..., S) that were decided elsewhere for tokens `x` (..., I), until other tokens are read."""
        self._gates.keep(x, gates)

    def read(self, x: Tensor) -> Tensor:
        """Transforms tokens `x` (..., I) for the linears to multiply: (..., I), or `x` itself if there is no transform.

        Tokens are transformed once for all linears that are given the same tensor.
        """
        transform = self.transform
        return x if transform is None else self._transformed.get(x, lambda: transform.to_input(x))

    def gated(self, x: Tensor) -> Tensor:
        """Repeats the transformed tokens of `x` (..., I) once per slice, with zeros for closed slices: (..., S * I).

        The product of the result with all slices side by side is the sum over the open slices. Linears that are given
        the same tensor share it.
        """
        gates = self.gates(x).to(x.dtype)
        return self._gated.get(x, lambda: (gates.unsqueeze(-1) * self.read(x).unsqueeze(-2)).flatten(-2))

    def forget(self) -> None:
        """Drops what is kept for the last tensor; call it after a change of router, threshold, transform or reading."""
        for memo in (self._gates, self._gated, self._transformed):
            memo.forget()
        if self.kernel is not None:
            self.kernel.forget()

    def set_tables(self, layer: Tensor, pooled: Tensor) -> None:
        """Stores the thresholds of both scopes, (S, budgets) each; row k is for a model with the first k + 1 slices."""
        self.layer_thresholds.copy_(layer)
        self.global_thresholds.copy_(pooled)

    def reset_count(self, rows: int) -> bool:
        """Sets the counts of what is read to 0, for each of `rows` rows of the batches to come.

        Returns:
            Whether the counters were replaced by others.
        """
        if len(self.bits_read) == rows and not self.bits_read.is_inference():
            self.bits_read.zero_()
            self.tokens_read.zero_()
            return False
        with torch.inference_mode(False):  # or they could not be counted up outside of it
            self.bits_read = self.bits_read.new_zeros(rows)
            self.tokens_read = self.tokens_read.new_zeros(rows)
        return True

    def count(self, bits: Tensor) -> None:
        """Counts tokens, of which each reads `bits` (...) int64 code bits of a weight; padding is left out."""
        tokens, mask = torch.ones_like(bits), self.state.mask
        if mask is not None and mask.numel() == bits.numel():
            tokens = mask.to(bits.dtype).reshape(bits.shape)
            bits = bits * tokens
        rows = len(self.bits_read)
        self.bits_read += bits.reshape(rows, -1).sum(1)
        self.tokens_read += tokens.reshape(rows, -1).sum(1)

    def _decide(self, x: Tensor) -> Tensor:
        """Gates (..., S) of tokens (..., I), by the present reading; observers are told."""
        reading = self.reading
        if not isinstance(reading, Routed):
            raise RuntimeError(
                f"tokens have no gates while they are read as {reading}; only a routed reading decides them"
            )
        router, rule = self.router if reading.router is None else reading.router, reading.rule
        given, x = x, self._in_rows(x)
        scores = router.scores(x)[..., : len(self.slice_bits) - 1]
        trained = router.training and torch.is_grad_enabled()
        if trained and isinstance(rule, (CommonThreshold, MeetBudget)):
            scores = router.bounded(scores)  # these thresholds are quantiles of bounded scores
        flat = prefix_scores(scores).flatten(0, -2)
        for observer in self.observers:
            observer.on_scores(router, x, flat)
        if isinstance(rule, CommonThreshold):
            opened = None if rule.opened is None else rule.opened.reshape(scores.shape)
            gates = router.gates(scores, rule.threshold, opened)
        elif isinstance(rule, MeetBudget):
            pooled = gathered(flat) if rule.together else flat
            threshold = threshold_for_budget(pooled, self.slice_bits, [rule.bits])[0]
            if trained:
                arguments = (self.slice_bits, router.temperature)
                threshold = with_budget_gradient(threshold, flat, *arguments, together=rule.together)
            gates = router.gates(scores, threshold)
        else:
            gates = router.gates(scores, self._threshold_of_rows(router, x) if self.state.per_row else router.threshold)
        if self.observers:
            bits = self.bits_of(gates)
            for observer in self.observers:
                observer.on_bits(bits)
        return gates if given is x else gates.reshape(*given.shape[:-1], gates.shape[-1])

    def _in_rows(self, x: Tensor) -> Tensor:
        """Tokens as (B, T, I): those of all rows one after the other, (N, I), where B and T are known; and (B, ..., T, I)."""
        shape = self.state.shape
        if x.ndim == 2 and shape is not None and len(x) == shape[0] * shape[1]:
            return x.view(*shape, -1)
        return x.flatten(1, -2) if x.ndim > 3 else x

    def _threshold_of_rows(self, router: Router, x: Tensor) -> Tensor:
        """Thresholds that fit tokens (B, T, I), one for each row: (B, 1, 1)."""
        threshold = router.threshold
        if threshold.ndim == 0:  # a control spends the same on all rows
            return threshold
        self.check_rows(x)
        rows, batch = len(threshold), x.shape[0]
        return threshold if rows == batch else threshold.repeat_interleave(batch // rows, dim=0)

    def check_rows(self, x: Tensor) -> None:
        """Checks that budgets for each row fit the rows of tokens `x` (B, T, I).

        Raises:
            BitsError: If budgets were set for another number of rows.
        """
        x = self._in_rows(x)
        rows, batch = len(self.router.threshold), x.shape[0]
        if x.ndim != 3 or (rows != batch and not (self.state.expanded and batch % rows == 0)):
            raise BitsError(
                f"{rows} budgets were set, one for each row, but the input is of shape {tuple(x.shape)}, not "
                f"({rows}, tokens, {x.shape[-1]}); give as many budgets as rows, or one for all"
            )

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes on tables of other budgets: those of a run that an earlier version has begun."""
        budgets = state.get(f"{prefix}{BUDGETS}")
        if budgets is not None and budgets.shape != self.budgets.shape and budgets.ndim == 1:
            self.budgets = self.budgets.new_empty(len(budgets))
            for name in THRESHOLDS:
                setattr(self, name, self.get_buffer(name).new_empty(len(self.get_buffer(name)), len(budgets)))
        super()._load_from_state_dict(state, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.kernel is not None:
            self.kernel.release()
        return super()._apply(without_casts(fn), recurse)  # type: ignore[no-untyped-call]

    def bits_of(self, gates: Tensor) -> Tensor:
        """Code bits per weight (...) that open gates (..., S) add up to."""
        # Not a product with a tensor of slice bits: copying that to a device would make the host wait for it.
        terms = [gate * bits for gate, bits in zip(gates.unbind(-1), self.slice_bits, strict=True)]
        return torch.stack(terms).sum(0)

    def extra_repr(self) -> str:
        """Sizes that `print(module)` shows of this input."""
        return f"{list(self.slice_bits)} bits, {self.n_weights} weights"
