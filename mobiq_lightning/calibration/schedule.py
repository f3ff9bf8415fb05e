"""Stages of a calibration, and which of them trains what in which epoch of the one fit."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from mobiq_lightning.nn import Learned
from mobiq_lightning.strategies.numbers import MOST

Bound = Literal["clipping", "rounding"]
BOUNDED: dict[Bound, Learned] = {"clipping": "ranges", "rounding": "codes"}
"""What each bound keeps in its limits."""


@dataclass(kw_only=True)
class Stage:
    """A part of the calibration: what is trained, where, at which depth, for how long.

    Stages that follow each other with `scope: block` are one sweep: each block goes through all of them before the next
    block begins. A stage with `scope: model` trains all blocks together, end to end, once the sweep before it is done. So
    the order of the stages decides whether the slices of a block follow each other, or the blocks of a slice.

    Args:
        train: What is trained. `ranges`: the quantization ranges of the groups. `codes`: the codes of the slice that reaches
            `depth`, all coarser slices being frozen. `transforms`: what the transform learns. `routers`: the routers.
        bounds: Limits for what is trained. `clipping`: ranges can only become narrower than the weights of their group.
            `rounding`: each code moves to a neighbour of the weight's own code at most.
        share: The part of the block's `epochs_per_block` that this stage takes, in (0, 1]. Give either this or `epochs`.
        epochs: Passes over the calibration windows, for each block or for the model.
        depth: The fixed depth that is trained, in bits; by default those of the objective.
        other_depths: Depths in the loss beside `depth`, in bits, each with its weight. Coarser ones read the first bits of
            the codes in training. At finer ones weights are the source's, moved into the cells that the codes in training
            leave them, so that a code moves only if that is worth more than what finer depths lose.
        mixed: Part of the steps, in [0, 1], in which some inputs, drawn anew for each step, read `depth` and the others the depth
            before it: what a dial between the two makes of the model. Only where the whole model is trained.
        lr_scale: What the learning rates of what is trained are multiplied with.
        scope: `block`: one block after the other, against its output. `model`: all, against the model's output.
    """

    train: list[Learned]
    bounds: list[Bound] = field(default_factory=list)
    share: float | None = None
    epochs: int | None = None
    depth: int | None = None
    other_depths: dict[int, float] = field(default_factory=dict)
    mixed: float = 0.0
    lr_scale: float = 1.0
    scope: Literal["block", "model"] = "block"

    @property
    def depths(self) -> dict[int, float] | None:
        """The fixed depths in its loss, in bits, with their weights; None: those of the objective."""
        if self.trains_routers_alone:
            return {}
        return None if self.depth is None else {self.depth: 1.0, **self.other_depths}

    def trains(self, kind: Learned) -> bool:
        """Whether it trains ranges, codes, transforms or routers."""
        return kind in self.train

    @property
    def trains_routers_alone(self) -> bool:
        """Whether nothing that a checkpoint stores of the weights changes in it."""
        return self.train == ["routers"]

    @property
    def trained(self) -> str:
        """What it trains, for people to read, as in ``codes + ranges, bounded by rounding``."""
        return " + ".join(self.train) + (f", bounded by {' and '.join(self.bounds)}" if self.bounds else "")


def default_stages() -> list[Stage]:
    """Ranges and transforms at fixed depths for a third of a block's epochs, then together with routers."""
    return [
        Stage(train=["ranges", "transforms"], share=1 / 3),
        Stage(train=["ranges", "transforms", "routers"], share=2 / 3),
    ]


@dataclass(frozen=True)
class Segment:
    """Consecutive epochs in which one stage trains one block, or the model.

    Args:
        stage: The stage.
        number: The position of the stage in the recipe, from 0.
        block: The index of the block; None for the model.
        sweep: Number of the sweep, or of the model stage, that it belongs to.
        epochs: The epochs of the fit that it takes.
        span: Epochs over which learning rates and budgets run their course: those of the segment, or of the visit where
            stages are shares of one course.
        visit: Epochs of the fit that the sweep spends at this block without a break.
    """

    stage: Stage
    number: int
    block: int | None
    sweep: int
    epochs: range
    span: range
    visit: range


class Schedule:
    """Which epoch of a fit trains what.

    Args:
        stages: The stages of the recipe, in their order.
        epochs_per_block: The epochs of a block that the shares of stages divide.
        n_blocks: Number of decoder blocks.
    """

    def __init__(self, stages: Sequence[Stage], epochs_per_block: int, n_blocks: int) -> None:
        self.segments: list[Segment] = []
        self.sweeps: list[list[Stage]] = []
        self.n_blocks = n_blocks
        for numbered in sweeps_of(stages):
            sweep = [stage for _, stage in numbered]
            blocks = [None] if sweep[0].scope == "model" else list(range(n_blocks))
            for block in blocks:
                self._visit(numbered, block, epochs_per_block)
            self.sweeps.append(sweep)
        self._starts = [segment.epochs.start for segment in self.segments]

    def _visit(self, numbered: Sequence[tuple[int, Stage]], block: int | None, epochs_per_block: int) -> None:
        counts = epochs_of([stage for _, stage in numbered], epochs_per_block)
        start = self.n_epochs
        visit = range(start, start + sum(counts))
        for (number, stage), count in zip(numbered, counts, strict=True):
            epochs = range(start, start + count)
            start += count
            if count:
                span = visit if stage.share is not None else epochs
                self.segments.append(Segment(stage, number, block, len(self.sweeps), epochs, span, visit))

    @property
    def n_epochs(self) -> int:
        """Epochs of the fit."""
        return self.segments[-1].epochs.stop if self.segments else 0

    def at(self, epoch: int) -> Segment:
        """The segment of an epoch; after the last one, the last segment."""
        return self.segments[max(0, bisect_right(self._starts, epoch) - 1)]

    def ends_visit(self, epoch: int) -> bool:
        """Whether this is the last epoch of a visit: of a block, or of a model stage."""
        return epoch == self.at(epoch).visit.stop - 1

    def visits_until(self, epoch: int) -> tuple[int, int]:
        """The visits that have ended when an epoch ends, and all."""
        ends = sorted({segment.visit.stop for segment in self.segments})
        return bisect_right(ends, epoch + 1), len(ends)

    def stages_of_visit(self, epoch: int) -> list[Stage]:
        """The stages of the visit that an epoch belongs to, in their order."""
        visit = self.at(epoch).visit
        return [segment.stage for segment in self.segments if segment.visit == visit]

    def final_epoch(self, block: int) -> int:
        """The epoch after which nothing changes any more in what a block stores beside its routers."""
        last = [
            segment.epochs.stop - 1
            for segment in self.segments
            if segment.block in (block, None) and not segment.stage.trains_routers_alone
        ]
        visits = [segment.visit.stop - 1 for segment in self.segments if segment.block == block]
        return max([*last, *visits[:1]], default=0)

    def trains_codes_after(self, segment: Segment) -> bool:
        """Whether a later segment of the same block, or of the model, moves codes."""
        later = self.segments[self.segments.index(segment) + 1 :]
        return any(
            s.stage.trains("codes") and (None in (s.block, segment.block) or s.block == segment.block) for s in later
        )


def sweeps_of(stages: Sequence[Stage]) -> Iterator[list[tuple[int, Stage]]]:
    """Stages with their numbers: block stages that follow each other together, model stages each for itself."""
    keyed = [
        ((stage.scope, number if stage.scope == "model" else 0), number, stage) for number, stage in enumerate(stages)
    ]
    for _, group in groupby(keyed, key=lambda item: item[0]):
        yield [(number, stage) for _, number, stage in group]


def epochs_of(sweep: Sequence[Stage], epochs_per_block: int) -> list[int]:
    """Epochs of the stages of one sweep."""
    counts, end, taken = [], 0.0, 0
    for stage in sweep:
        if stage.share is None:
            counts.append(stage.epochs or 0)
            continue
        end += stage.share
        # An epoch belongs to the stage in which it begins; the last stage takes what rounding leaves.
        stop = epochs_per_block if stage is sweep[-1] else math.ceil(end * epochs_per_block - 1e-6)
        counts.append(max(0, min(stop, epochs_per_block) - taken))
        taken += counts[-1]
    return counts


_NEVER_NULL = ("train", "bounds", "other_depths", "mixed", "lr_scale", "scope")
"""Keys of a stage that have a value whether it is given or not."""


def stage_problems(
    stages: Sequence[Stage], depths: Sequence[int], learns_codes: bool, epochs_per_block: int
) -> Iterator[str]:
    """What is wrong with the stages of a recipe.

    Args:
        stages: The stages, as the recipe gives them.
        depths: The depths of the slices, in bits.
        learns_codes: Whether the slice scheme has codes that can be trained.
        epochs_per_block: The epochs of a block that the shares of stages divide.
    """
    if not stages:
        yield "model.stages: there is none; give at least one"
    for sweep in sweeps_of(stages):
        shares = [stage.share for _, stage in sweep if stage.share is not None]
        if shares and len(shares) < len(sweep):
            yield "model.stages: block stages that follow each other have all a share, or all a number of epochs"
        elif shares and (not math.isclose(sum(shares), 1.0, abs_tol=0.02) or not min(shares) > 0):
            yield f"model.stages: shares {shares} must be above 0 and add up to 1"
        elif shares:
            yield from _without_epochs(sweep, epochs_per_block)
    reached = 0
    for number, stage in enumerate(stages):
        where = f"model.stages[{number}]"
        if null := [name for name in _NEVER_NULL if getattr(stage, name) is None]:
            yield f"{where}: {', '.join(null)}: null is no value; leave the key out, or give one"
            continue
        if not stage.train:
            yield f"{where}: train names nothing; give some of ranges, codes, transforms, routers"
        for bound in stage.bounds:
            if BOUNDED[bound] not in stage.train:
                yield f"{where}: bounds {bound} of {BOUNDED[bound]}, which it does not train; add them to train"
        if stage.share is None and (stage.epochs or 0) < 1:
            yield f"{where}: epochs ({stage.epochs}) must be at least 1, or give a share of epochs_per_block"
        if stage.share is not None and stage.epochs is not None:
            yield f"{where}: give share ({stage.share:g}) or epochs ({stage.epochs}), not both"
        others = stage.other_depths
        if others and (stage.depth is None or stage.depth in others or not set(others) <= set(depths)):
            yield f"{where}: other_depths ({others}) takes depths of {list(depths)} beside depth ({stage.depth})"
        if not 0 < stage.lr_scale <= MOST:
            yield f"{where}: lr_scale ({stage.lr_scale:g}) must be above 0 and at most {MOST:g}"
        if wrong := [weight for weight in stage.other_depths.values() if not 0 <= weight <= MOST]:
            yield f"{where}: other_depths: weight {wrong[0]:g} must be at least 0 and at most {MOST:g}"
        if stage.mixed and stage.trains_routers_alone:
            yield f"{where}: mixed ({stage.mixed:g}) mixes depths, and a stage that trains routers alone reads as they decide"
        if not 0 <= stage.mixed <= 1:
            yield f"{where}: mixed ({stage.mixed:g}) is a part of the steps; give 0 to 1"
        if stage.mixed and (stage.scope != "model" or stage.depth in (None, depths[0])):
            yield f"{where}: mixed ({stage.mixed:g}) takes scope: model and a depth above {depths[0]}, to mix with the one before"
        if stage.epochs is not None and stage.epochs > MOST:
            yield f"{where}: epochs ({stage.epochs:.3g}) must be at most {MOST:g}"
        if stage.scope == "model" and stage.share is not None:
            yield f"{where}: scope model takes epochs, as shares are of a block's epochs"
        if stage.depth is not None and stage.depth not in depths:
            yield f"{where}: depth {stage.depth} is no prefix of the slices; depths are {list(depths)}"
        if stage.trains("codes"):
            if not learns_codes:
                yield f"{where}: codes cannot be trained by this slice scheme; use ProgressiveSlices"
            if stage.depth is None:
                yield f"{where}: training codes takes a depth: the one whose slice is trained"
            elif stage.depth < reached:
                yield f"{where}: depth {stage.depth} comes after depth {reached}, by which its codes are frozen"
            reached = max(reached, stage.depth or 0)


def _without_epochs(sweep: Sequence[tuple[int, Stage]], epochs_per_block: int) -> Iterator[str]:
    """A line for each stage whose share is rounded to no epoch, so that it would train nothing."""
    for (number, stage), count in zip(sweep, epochs_of([stage for _, stage in sweep], epochs_per_block), strict=True):
        if stage.share is not None and count < 1 <= epochs_per_block:
            enough = math.ceil(1 / min(other.share or 1.0 for _, other in sweep))
            yield (
                f"model.stages[{number}]: share {stage.share:.3g} of model.epochs_per_block ({epochs_per_block}) is no epoch, so "
                f"that it would train nothing; with {enough} epochs per block every stage has one"
            )
