"""A few calibration windows on their way through the model, calibrated and uncalibrated beside each other.

What comes out says, while a calibration runs, whether it is better than doing nothing: block by block, and as the perplexity
of the whole model as far as it is done.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mobiq_lightning.calibration.sliced_source import SlicedSource
from mobiq_lightning.nn import fixed_depth, full_precision, transformed_by
from mobiq_lightning.sources import check_output
from mobiq_lightning.strategies.base import SliceScheme
from mobiq_lightning.strategies.objectives.block_reconstruction import relative_error
from mobiq_lightning.strategies.objectives.logit_distillation import divergence

if TYPE_CHECKING:
    from mobiq_lightning.nn import SlicedLinear
    from mobiq_lightning.strategies.transform_base import InputTransform

Kind = Literal["calibrated", "rounded"]
Streams = dict[tuple[Kind, int], Tensor]
_DRIFT = 0.05
"""The part of the rounded error at the lowest depth by which blocks may be farther from full precision than rounded ones."""


@dataclass
class Measured:
    """What the windows gave at each depth, in bits, calibrated and rounded.

    Args:
        error: Relative squared error of the block's output, of its spread; empty if the whole model was measured.
        perplexity: Perplexity of the whole model; empty if the block alone was measured.
        kl: KL divergence of the whole model from the full-precision model, nats per token; empty if the block alone was.
        full_perplexity: Perplexity of the full-precision model; NaN if the block alone was measured.
    """

    error: dict[tuple[Kind, int], float] = field(default_factory=dict)
    perplexity: dict[tuple[Kind, int], float] = field(default_factory=dict)
    kl: dict[tuple[Kind, int], float] = field(default_factory=dict)
    full_perplexity: float = math.nan


class Probe:
    """Windows in front of a block: through the blocks before it in full precision, and at each depth calibrated and rounded.

    Rounded is read with schemes and transforms as they begin: for nested codes round-to-nearest, for others what they find
    without training. What was passed is kept, so that a block costs what it costs once.

    Args:
        sliced: The model being calibrated.
        input_ids: (N, T) windows.
        depths: Depths at which blocks are read, in bits.
        batch_size: Windows per call of a block.
        alone: Whether each block is measured by itself: in front of it and behind it the model is in full precision, so that
            nothing depends on what other blocks have learned.
    """

    def __init__(
        self, sliced: SlicedSource, input_ids: Tensor, depths: Sequence[int], batch_size: int, alone: bool = False
    ) -> None:
        self.sliced, self.input_ids, self.depths, self.batch_size = sliced, input_ids, tuple(depths), batch_size
        self.alone = alone
        self.block = 0
        self.full = sliced.caller.embed_all(input_ids)
        kinds: tuple[Kind, ...] = ("calibrated", "rounded")
        self.streams: Streams = {(kind, depth): self.full for kind in kinds for depth in depths}
        self._passed: tuple[Tensor, Streams] | None = None

    def advance(self, block: int) -> None:
        """Moves on to `block`, or behind the last one."""
        while self.block < block:
            if self.alone:
                self.full = self._target(self.block, self.full) if self._passed is None else self._passed[0]
                self.streams, self._passed = dict.fromkeys(self.streams, self.full), None
                self.block += 1
                continue
            calibrated = self._calibrated(self.block, self.streams)
            if self._passed is None:
                full, (rounded, _) = self._target(self.block, self.full), self._rounded(self.block)
            else:  # measured before: neither depends on what was learned
                full, rounded = self._passed
            self.full, self.streams, self._passed = full, {**calibrated, **rounded}, None
            self.block += 1

    def measure_block(self, others_sliced: bool, model: bool | None = True) -> Measured:
        """The block in front of which the windows are, and the model with it.

        The block is measured on the inputs that the calibrated blocks before it give at the same depth, or the full-precision
        model if it is measured alone, against the output of the full-precision model, as it was trained; its rounded codes are
        measured on the same inputs.

        Args:
            others_sliced: Whether the blocks behind it are calibrated already; else they are in full precision.
            model: Whether the model is measured; by None if what comes out of the block is, at some depth, farther from full
                precision than what comes out of the rounded blocks. The way through all later blocks is what costs.
        """
        block, found = self.block, Measured()
        target = self._target(block, self.full)
        rounded, same_inputs = self._rounded(block)
        self._passed = (target, rounded)
        outputs = {**self._calibrated(block, self.streams), **rounded}
        for depth in self.depths:
            found.error["calibrated", depth] = float(relative_error(outputs["calibrated", depth], target))
            found.error["rounded", depth] = float(relative_error(same_inputs[depth], target))
        if model is None:
            rounds = {depth: float(relative_error(rounded["rounded", depth], target)) for depth in self.depths}
            slack = _DRIFT * rounds[min(rounds)]
            model = not all(found.error["calibrated", depth] <= rounds[depth] + slack for depth in self.depths)
        if not model:
            return found
        for later in range(block + 1, len(self.sliced.blocks)):
            target = self._target(later, target)
            if others_sliced and not self.alone:
                with uncalibrated(self.sliced, later):
                    rounded = {key: self._at(later, key[1], outputs[key]) for key in outputs if key[0] == "rounded"}
                outputs = {**self._calibrated(later, outputs), **rounded}
            else:
                outputs = {key: self._full(later, hidden) for key, hidden in outputs.items()}
        self._measure_model(found, target, outputs)
        return found

    def measure_model(self) -> Measured:
        """The whole model, all blocks being calibrated."""
        self.advance(len(self.sliced.blocks))
        found = Measured()
        self._measure_model(found, self.full, self.streams)
        return found

    @torch.no_grad()
    def _measure_model(self, found: Measured, target: Tensor, outputs: Streams) -> None:
        full_nll, nll = 0.0, dict.fromkeys(outputs, 0.0)
        found.kl = dict.fromkeys(outputs, 0.0)
        count = len(self.input_ids)
        with self.sliced.caller.after_blocks() as logits_of:
            for row in range(count):  # one by one: logits are wide
                ids = self.input_ids[row : row + 1]
                reference = F.log_softmax(logits_of(ids, target[row : row + 1]).float(), dim=-1)
                full_nll += _nll(reference, ids) / count
                for key, hidden in outputs.items():
                    logits = logits_of(ids, hidden[row : row + 1])
                    found.kl[key] += float(divergence(logits, reference)) / count
                    nll[key] += _nll(F.log_softmax(logits.float(), dim=-1), ids) / count
        found.perplexity = {key: _exp(value) for key, value in nll.items()}
        found.full_perplexity = _exp(full_nll)

    # ------------------------------------------------------------------ one block

    def _full(self, block: int, hidden: Tensor) -> Tensor:
        with full_precision(self.sliced.block_at(block).routed_inputs()):
            return self._call(block, hidden)

    def _target(self, block: int, hidden: Tensor) -> Tensor:
        """What the block makes of the full-precision model's own hidden states, refused if it is not finite."""
        with full_precision(self.sliced.block_at(block).routed_inputs()):
            output = self._call(block, hidden)
            module, place = self.sliced.caller.blocks[block], f"block {block + 1}/{len(self.sliced.blocks)}"
            check_output(output, module, lambda: self._call(block, hidden), place)
        return output

    def _at(self, block: int, depth: int, hidden: Tensor) -> Tensor:
        with fixed_depth(self.sliced.block_at(block).routed_inputs(), depth):
            return self._call(block, hidden)

    def _calibrated(self, block: int, streams: Streams) -> Streams:
        return {key: self._at(block, key[1], hidden) for key, hidden in streams.items() if key[0] == "calibrated"}

    def _rounded(self, block: int) -> tuple[Streams, dict[int, Tensor]]:
        """What the rounded block makes of the rounded streams, and of the calibrated one of each depth."""
        with uncalibrated(self.sliced, block):
            passed = {key: self._at(block, key[1], self.streams[key]) for key in self.streams if key[0] == "rounded"}
            return passed, {depth: self._at(block, depth, self.streams["calibrated", depth]) for depth in self.depths}

    @torch.no_grad()
    def _call(self, block: int, hidden: Tensor) -> Tensor:
        return torch.cat([self.sliced.caller.call(block, part) for part in hidden.split(self.batch_size)])


def fresh_schemes(sliced: SlicedSource, block: int) -> list[tuple[SlicedLinear, SliceScheme]]:
    """The linears of a block, each with a scheme as it begins."""
    linears = sliced.block_at(block).sliced_linears()
    with torch.random.fork_rng(devices=[]):  # training must not depend on whether somebody looks
        return [(li, sliced.slices(li.out_features, li.in_features).to(sliced.caller.device)) for li in linears]


def fresh_transforms(sliced: SlicedSource, block: int) -> list[InputTransform | None]:
    """Transforms of the inputs of a block, as they begin before anything is known of the input: without effect."""
    transforms = [sliced.transform.for_input(r.router.in_features) for r in sliced.block_at(block).routed_inputs()]
    return [None if transform is None else transform.to(sliced.caller.device) for transform in transforms]


@contextmanager
def uncalibrated(sliced: SlicedSource, block: int) -> Iterator[None]:
    """Within it, a block is read with schemes and transforms as they begin."""
    linears = fresh_schemes(sliced, block)
    schemes = [linear.scheme for linear, _ in linears]
    with transformed_by(sliced.block_at(block).routed_inputs(), fresh_transforms(sliced, block)):
        try:
            for linear, scheme in linears:
                linear.slice_by(scheme)
            yield
        finally:
            for (linear, _), scheme in zip(linears, schemes, strict=True):
                linear.slice_by(scheme)


def _nll(log_probs: Tensor, ids: Tensor) -> float:
    """Mean negative log-likelihood of the next tokens, from log-probabilities (1, T, V) and tokens (1, T)."""
    return float(F.nll_loss(log_probs[0, :-1], ids[0, 1:].to(log_probs.device)))


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
