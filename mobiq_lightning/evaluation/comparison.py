"""Compares one checkpoint at every budget with full precision, round-to-nearest and the controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.evaluation.controls import control_router, control_thresholds
from mobiq_lightning.evaluation.metrics import KLDivergence, Perplexity, UsedBits, log_probabilities
from mobiq_lightning.evaluation.rounding import wrap_for_rounding
from mobiq_lightning.evaluation.routing_use import RoutingUse
from mobiq_lightning.nn import (
    BlockLayout,
    ElasticLinear,
    OneBlockAtATime,
    fixed_depth,
    full_precision,
    input_names,
    record_gates,
    routed_by,
    routed_inputs,
    stored_bits,
)
from mobiq_lightning.runs import CONTROLS, Allocation, Row
from mobiq_lightning.runtime import elastic_block_by_block
from mobiq_lightning.sources import IGNORED, ComparisonPass, check_output
from mobiq_lightning.strategies.thresholds import Scope

RTN_BITS = (2, 3, 4, 6, 8)
Passes = Callable[[Tensor, Sequence[Callable[[int], AbstractContextManager[Any]]]], Iterator[Tensor]]
"""Gives the logits (B, T, V) of tokens (B, T) for each of many ways to read a block, by its index."""
MakesPasses = Callable[[nn.Module, Sequence[nn.Module], OneBlockAtATime], Passes]
"""Makes that of a model, its decoder blocks, and what brings these to the device."""


@dataclass
class Arm:
    """One row of the comparison while it is measured: an allocation at a budget, with its metrics.

    Args:
        allocation: Name of what decides how deep tokens read, such as ``router`` or ``random``.
        target_bits: The budget asked for, in bits per weight.
        seed: Seed of what the allocation draws, the order of layers or tokens. It is the run's own for the router and
            for best layers, and None for full precision and round-to-nearest.
        thresholds: (inputs,) thresholds at which a control spends the bits that the router used at `target_bits`.
        perplexity: Metric of the perplexity.
        kl: Metric of the KL divergence to full precision.
        used: Metric of the bits that tokens read; None where all of them read the same.
        routing: Metric of what routers do with the text; None but for the router.
        known: Whether its figures are those of another arm, so that it is not run.
    """

    allocation: Allocation
    target_bits: float
    seed: int | None = None
    thresholds: Tensor | None = None
    perplexity: Perplexity = field(default_factory=Perplexity)
    kl: KLDivergence = field(default_factory=KLDivergence)
    used: UsedBits | None = None
    routing: RoutingUse | None = None
    known: bool = False


class Comparison:
    """Runs batches through every arm of the comparison and turns what was measured into rows.

    The first pass over the text measures full precision, round-to-nearest and the router. The second measures the
    controls, which are given the very bits that the router used in the first.

    Args:
        full: The source model; its decoder linears are wrapped in place, for round-to-nearest.
        elastic: The elastic model.
        layout: Place of the decoder blocks in both models.
        eval_bits: Budgets in bits per weight.
        random_seeds: Seeds of the allocations with random tokens.
        scope: Threshold table that the router uses, ``layer`` or ``global``.
        device: Device that both models run on.
        seed: Seed that the run was calibrated with.
        rounded_rows: Rows of round-to-nearest if another run has measured them on this model and text.
        gains: (inputs, S - 1) gains of the slices, nats per token; without them the control of best layers is left out.
        by_block: For models that are larger than the device: both stay on the host, and each decoder block is on the device
            while it runs. Makes, of a model, its blocks and what brings them, what reads a batch in many ways while each is
            there. What is measured is the same.
    """

    def __init__(
        self,
        full: nn.Module,
        elastic: Any,
        layout: BlockLayout,
        eval_bits: Sequence[float],
        random_seeds: Sequence[int],
        scope: Scope,
        device: torch.device,
        seed: int | None = None,
        rounded_rows: Sequence[Row] | None = None,
        gains: Tensor | None = None,
        by_block: MakesPasses | None = None,
    ) -> None:
        if by_block is None:
            full, elastic = full.to(device), elastic.to(device)
        self.full, self.elastic, self.device, self.scope = full, elastic, device, scope
        self.inputs = routed_inputs(elastic)
        self.names = input_names(elastic)
        self.sizes = [routed.n_weights for routed in self.inputs]
        self.slice_bits = self.inputs[0].slice_bits
        linears = [m for m in elastic.modules() if isinstance(m, ElasticLinear)]
        self.rounded, self.rounded_overhead = wrap_for_rounding(full, layout, linears[0].group_size)
        self.passes: tuple[Passes, Passes] | None = None
        if by_block is not None:
            blocks = list(layout.find(full)), list(layout.find(elastic))
            place = {id(routed): position for position, routed in enumerate(self.inputs)}
            self.places = [[place[id(routed)] for routed in routed_inputs(block)] for block in blocks[1]]
            self.passes = (
                by_block(full, blocks[0], OneBlockAtATime(full, blocks[0], device)),
                by_block(elastic, blocks[1], elastic_block_by_block(elastic, blocks[1], device)),
            )
        self.full_bits = 8 * next(full.parameters()).element_size()
        self.overhead_bits, self.router_bits, self.sliced_part = stored_bits(elastic)
        self.first = [Arm("full", self.full_bits)]
        self.rounded_rows, self.rounded_key = rounded_rows, dict[str, Any]()
        self.first += [Arm("rtn", bits) for bits in RTN_BITS] if rounded_rows is None else []
        self.first += [Arm("router", bits, seed) for bits in eval_bits]
        self.second: list[Arm] = []
        self.random_seeds, self.seed, self.gains = random_seeds, seed or 0, gains
        for arm in self.first:
            self._prepare(arm)

    def start_second_pass(self) -> None:
        """Sets up the arms of the controls, giving each the bits that the router used in the first pass."""
        for arm in [a for a in self.first if a.allocation == "router"]:
            assert arm.used is not None
            spent = arm.used.per_input_everywhere()
            for control in CONTROLS:
                if control == "layers" and self.gains is None:
                    continue
                seeds = [self.seed] if control in ("static", "layers") else self.random_seeds
                for seed in seeds:
                    found = control_thresholds(control, self.sizes, self.slice_bits, spent, seed, self.gains)
                    other = Arm(control, arm.target_bits, seed, found)
                    same = arm if self._nothing_to_choose(spent) else self._same_layers(other)
                    if same is not None:
                        other.perplexity, other.kl, other.used, other.known = same.perplexity, same.kl, same.used, True
                    else:
                        self._prepare(other)
                    self.second.append(other)

    def _same_layers(self, arm: Arm) -> Arm | None:
        """An arm that gives every layer the depth that this one gives it, such as best layers at a depth of the slices."""
        assert arm.thresholds is not None
        kinds = ("static", "layers")
        others = [other for other in self.second if other.allocation in kinds and arm.allocation in kinds]
        return next((other for other in others if torch.equal(other.thresholds, arm.thresholds)), None)  # type: ignore[arg-type]

    def _nothing_to_choose(self, spent: Sequence[float]) -> bool:
        """Whether all tokens read the base slice alone, or all slices, so that every allocation reads the same weights."""
        depths = self.inputs[0].depths
        return any(all(bits == depth for bits in spent) for depth in (depths[0], depths[-1]))

    @torch.no_grad()
    def step(self, batch: dict[str, Tensor], number: ComparisonPass, batch_idx: int) -> None:
        """Runs one batch through all arms of a pass and updates their metrics.

        Args:
            batch: ``input_ids`` (B, T) and ``labels`` (B, T), `IGNORED` where padded.
            number: Pass that the batch belongs to.
            batch_idx: Number of the batch; with the seed it decides what random allocations draw.

        Raises:
            ModelError: If the full-precision model gives logits that are not finite: there is nothing to compare with.
        """
        ids, labels = batch["input_ids"].to(self.device), batch["labels"].to(self.device)
        scored, wanted = labels[:, 1:] != IGNORED, labels[:, 1:]
        arms = [arm for arm in (self.first if number is ComparisonPass.ROUTER else self.second) if not arm.known]
        others = [arm for arm in arms if arm.allocation != "full"]
        runs = (
            self._runs(others, ids, batch_idx) if self.passes is None else self._runs_by_block(others, ids, batch_idx)
        )
        logits = next(runs)[0][:, :-1][scored]
        with full_precision(self.rounded):
            check_output(logits, self.full, lambda: self.full(input_ids=ids, use_cache=False), "the whole model")
        reference = log_probabilities(logits)
        reference_probs, wanted = reference.exp(), wanted[scored]
        for arm in arms:
            log_probs = reference
            if arm.allocation != "full":
                logits, bits = next(runs)
                if arm.used is not None:
                    arm.used.update(bits, labels != IGNORED)
                if arm.routing is not None:
                    arm.routing.update(bits, ids, labels != IGNORED)
                log_probs = log_probabilities(logits[:, :-1][scored])
            arm.perplexity.update(log_probs, wanted)
            arm.kl.update(log_probs, reference, reference_probs)

    def rows(self) -> list[Row]:
        """The finished rows of all arms, full precision first, then round-to-nearest, the router and the controls."""
        first = [self._row(arm) for arm in self.first]
        return [first[0], *(self.rounded_rows or []), *first[1:], *map(self._row, self.second)]

    def bits_per_input(self) -> dict[float, list[float]]:
        """For each budget, the mean bits that the router read of each input's weights, in the order of the model."""
        arms = [arm for arm in self.first if arm.allocation == "router"]
        return {arm.target_bits: arm.used.per_input_everywhere() for arm in arms if arm.used is not None}

    def routing_uses(self) -> list[tuple[float, dict[str, Tensor]]]:
        """For each budget, the sums that tell how deep routers read which inputs, positions and tokens."""
        return [(arm.target_bits, arm.routing.compute()) for arm in self.first if arm.routing is not None]

    def _prepare(self, arm: Arm) -> None:
        for metric in (arm.perplexity, arm.kl):
            metric.to(self.device)
        if arm.allocation == "router" or arm.thresholds is not None:
            arm.used = UsedBits(self.sizes).to(self.device)
        if arm.allocation == "router":
            vocabulary = self.full.get_input_embeddings().num_embeddings  # type: ignore[operator]
            arm.routing = RoutingUse(self.sizes, self.inputs[0].depths, vocabulary).to(self.device)

    def _runs(self, arms: Sequence[Arm], ids: Tensor, batch_idx: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Logits (B, T, V) in full precision, then of each arm; with them, for each input, the bits (B, T) of its tokens."""
        yield _logits(self.full, ids, full_precision(self.rounded)), []
        for arm in arms:
            if arm.allocation == "rtn":
                yield _logits(self.full, ids, fixed_depth(self.rounded, int(arm.target_bits))), []
            else:
                found: list[list[Tensor]] = []
                reading = self._reading(arm, batch_idx, range(len(self.inputs)), found)
                yield _logits(self.elastic, ids, reading), [record[0] for record in found]

    def _runs_by_block(self, arms: Sequence[Arm], ids: Tensor, batch_idx: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """What `_runs` gives, of passes that go through a block together; arms of round-to-nearest come before others."""
        assert self.passes is not None
        rounded = [arm for arm in arms if arm.allocation == "rtn"]
        depths = [partial(fixed_depth, self.rounded, int(arm.target_bits)) for arm in rounded]
        of_full = [lambda block, read=read: read() for read in (partial(full_precision, self.rounded), *depths)]
        yield from ((logits, []) for logits in self.passes[0](ids, of_full))
        records: list[list[list[Tensor]]] = [[] for _ in arms[len(rounded) :]]
        of_elastic = [
            lambda block, arm=arm, found=found: self._reading(arm, batch_idx, self.places[block], found)
            for arm, found in zip(arms[len(rounded) :], records, strict=True)
        ]
        for logits, found in zip(self.passes[1](ids, of_elastic), records, strict=True):
            yield logits, [record[0] for record in found]

    @contextmanager
    def _reading(
        self, arm: Arm, batch_idx: int, positions: Sequence[int], records: list[list[Tensor]]
    ) -> Iterator[None]:
        """Within it, some inputs of the elastic model, by position, are read as an arm says; their records are added."""
        inputs = [self.inputs[position] for position in positions]
        if arm.allocation == "router":
            self.elastic.set_bits(arm.target_bits, self.scope)
        with self._controls(arm, batch_idx, positions), record_gates(inputs) as found:
            yield
        records += found

    def _controls(self, arm: Arm, batch_idx: int, positions: Sequence[int]) -> AbstractContextManager[None]:
        """Within it, inputs are allocated by the arm's control instead of their own router."""
        if arm.thresholds is None:
            return nullcontext()
        assert arm.seed is not None
        controls = []
        for position in positions:
            routed, threshold = self.inputs[position], arm.thresholds[position]
            control = control_router(arm.allocation, routed, arm.seed, threshold)  # type: ignore[arg-type]
            control.place(position, len(self.inputs))
            control.reseed(batch_idx)
            controls.append(control.to(self.device))
        return routed_by([self.inputs[position] for position in positions], controls)

    def _row(self, arm: Arm) -> Row:
        used = float(arm.target_bits) if arm.used is None else float(arm.used.compute())
        extra = {"full": 0.0, "rtn": self.rounded_overhead}.get(arm.allocation, self.overhead_bits)
        extra += self.router_bits if arm.allocation == "router" else 0.0
        return Row(
            allocation=arm.allocation,
            target_bits=float(arm.target_bits),
            used_bits=used,
            all_in_bits=used * (1.0 if arm.allocation == "full" else self.sliced_part) + extra,
            perplexity=float(arm.perplexity.compute()),
            kl=float(arm.kl.compute()),
            seed=arm.seed,
        )


def _logits(model: Any, ids: Tensor, reading: AbstractContextManager[None]) -> Tensor:
    """Logits (B, T, V) of a model that is read in some way; whoever is given them holds them alone."""
    with reading:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits
