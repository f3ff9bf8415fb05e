"""The guards of a calibration: each notices one kind of harm, and knows what to do about it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar

from mobiq_lightning.calibration.guarding.collapse import COLLAPSE_SHARE
from mobiq_lightning.calibration.guarding.fallback import State, restore, round_block
from mobiq_lightning.calibration.guarding.probe import Measured
from mobiq_lightning.runs import GuardName

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration

Action = Literal["stop", "repair", "record", "off"]
"""What a guard does where it notices something; `off` does not look."""


@dataclass(frozen=True)
class Sighting:
    """Something that a guard has noticed: a value beyond its limit.

    Args:
        depth: The depth, or the budget, at which it was seen, in bits.
        value: What was measured.
        limit: What the value should not exceed.
        input: Name of the input whose router it is about, if any.
    """

    depth: float
    value: float
    limit: float
    input: str | None = None


@dataclass(frozen=True)
class ProbeReading:
    """What the probe measured after a visit, and the depths, in bits, to look at.

    Args:
        measured: Errors, divergences and perplexities, calibrated and rounded.
        depths: Depths at which the calibrated model must not be worse than its limit.
    """

    measured: Measured
    depths: Sequence[int]


@dataclass(frozen=True)
class DepthShare:
    """How many tokens of an input read the same depth.

    Args:
        input: Name of the input.
        bits: The budget at which they do.
        share: Largest share of tokens at one depth, in [0, 1].
    """

    input: str
    bits: float
    share: float


Looked = TypeVar("Looked")


class Guard(ABC, Generic[Looked]):
    """Notices one kind of harm.

    Args:
        action: What is done where it notices something.
    """

    name: ClassVar[GuardName]
    """The argument of the callback `Guards` that sets its action; results.json lists its events under it."""
    advice: ClassVar[str]
    """What a user can do about it, as the beginning of a sentence."""

    def __init__(self, action: Action) -> None:
        self.action = action

    @abstractmethod
    def look(self, looked: Looked) -> list[Sighting]:
        """What is beyond its limit in what was looked at."""

    @abstractmethod
    def can_repair(self, module: ElasticCalibration, before: State | None) -> bool:
        """Whether there is something to go back to.

        Args:
            module: The calibration, at the end of a visit.
            before: What the blocks had learned before the current stage of the whole model, if it is known.
        """

    @abstractmethod
    def repair(self, module: ElasticCalibration, before: State | None) -> None:
        """Mends what it noticed, where `can_repair` says that it can; takes the arguments that `can_repair` takes."""


class HarmGuard(Guard[ProbeReading]):
    """A guard that compares what was calibrated with not having calibrated, at each depth.

    Its repair: the block falls back to codes without training, for good; the model goes back to where it was before the stage.
    """

    advice = "Lower model.rates.codes or model.rates.ranges, or give the stages more epochs"

    @abstractmethod
    def value(self, measured: Measured, depth: int) -> float:
        """The calibrated figure at a depth, in bits."""

    @abstractmethod
    def limit(self, measured: Measured, depth: int) -> float:
        """What the calibrated figure at a depth, in bits, must not exceed."""

    @abstractmethod
    def exceeds(self, value: float, limit: float) -> bool:
        """Whether a figure is beyond its limit, either of which may not be finite."""

    def look(self, looked: ProbeReading) -> list[Sighting]:
        """One sighting for each depth at which the calibrated figure is beyond its limit."""
        figures = [(d, self.value(looked.measured, d), self.limit(looked.measured, d)) for d in looked.depths]
        return [Sighting(*figure) for figure in figures if self.exceeds(*figure[1:])]

    def can_repair(self, module: ElasticCalibration, before: State | None) -> bool:
        """Whether the block has not fallen back before, or the beginning of the stage of the whole model is known."""
        block = module.block_index
        return before is not None if block is None else block not in module.record.given_up

    def repair(self, module: ElasticCalibration, before: State | None) -> None:
        """Gives up what the current visit has learned of the block, or of the whole model."""
        if module.block_index is not None:
            round_block(module, module.block_index)
        elif before is not None:
            restore(module, before)


class WorseBlock(HarmGuard):
    """Notices a block, or the model after a stage of its own, that is worse than rounded to nearest.

    A block is measured by the relative error of its output, the model by its KL divergence. One code with one range serves all
    depths, so a good calibration for few bits is always a little worse at 8 bits than rounding alone. Hence the limit: the
    rounded figure at the depth and a part of it, and the same part of the rounded figure at the lowest depth besides.

    Args:
        action: What is done where it notices something.
        tolerance: The part of the rounded figures by which a depth may be worse, 0 or more.
    """

    name = "worse_block"

    def __init__(self, action: Action, tolerance: float) -> None:
        super().__init__(action)
        self.tolerance = tolerance

    def value(self, measured: Measured, depth: int) -> float:
        """The relative error of the calibrated block at a depth; of the whole model its KL divergence, nats per token."""
        return (measured.error or measured.kl)["calibrated", depth]

    def limit(self, measured: Measured, depth: int) -> float:
        """The rounded figure, and the tolerated part of it and of the one at the lowest depth."""
        values = measured.error or measured.kl
        rounded, lowest = values["rounded", depth], values["rounded", min(depth for _, depth in values)]
        return rounded + self.tolerance * (rounded + lowest)

    def exceeds(self, value: float, limit: float) -> bool:
        """Whether the value is above a finite limit, or is NaN: where rounding itself overflows, nothing is worse."""
        return math.isfinite(limit) and not value <= limit


class WorseDepth(HarmGuard):
    """Notices a depth at which the whole model, its codes done, is farther from full precision than rounded to nearest.

    Where `WorseBlock` tolerates that few bits cost many a little, this says where and how much. There is no repair: the codes of
    one depth are those of all others.

    Args:
        action: What is done where it notices something; `repair` does what `record` does.
        tolerance: The part of the rounded KL divergence by which the depth may be worse, 0 or more.
    """

    name = "worse_depth"
    advice = (
        "Take out stages at this depth, so that its codes are rounded, lower their lr_scale, or set max_saturation of "
        "ProgressiveSlices"
    )

    def __init__(self, action: Action, tolerance: float) -> None:
        super().__init__(action)
        self.tolerance = tolerance

    def value(self, measured: Measured, depth: int) -> float:
        """The KL divergence of the calibrated model at a depth, nats per token."""
        return measured.kl["calibrated", depth]

    def limit(self, measured: Measured, depth: int) -> float:
        """The KL divergence of the rounded model at that depth, and the tolerated part of it."""
        return measured.kl["rounded", depth] * (1 + self.tolerance)

    def exceeds(self, value: float, limit: float) -> bool:
        """Whether the value is above a finite limit, or is NaN."""
        return math.isfinite(limit) and not value <= limit

    def can_repair(self, module: ElasticCalibration, before: State | None) -> bool:
        """Never: to go back would cost the depths that gained."""
        return False


class ExplodingProbe(HarmGuard):
    """Notices that the perplexity of calibration windows is not finite, or far above that of the rounded model.

    Args:
        action: What is done where it notices something.
        factor: How many times the perplexity of the rounded model is the limit, above 1.
    """

    name = "exploding_probe"

    def __init__(self, action: Action, factor: float) -> None:
        super().__init__(action)
        self.factor = factor

    def value(self, measured: Measured, depth: int) -> float:
        """The perplexity of the model with its calibrated blocks at a depth."""
        return measured.perplexity["calibrated", depth]

    def limit(self, measured: Measured, depth: int) -> float:
        """The factor times the perplexity of the model with rounded blocks."""
        return self.factor * measured.perplexity["rounded", depth]

    def exceeds(self, value: float, limit: float) -> bool:
        """Whether the value is not finite or above the limit."""
        return not (math.isfinite(value) and value <= limit)


class CollapsedRouter(Guard[DepthShare]):
    """Notices a router that cannot tell the tokens of its input apart: nearly all read one depth between two depths."""

    name = "collapsed_router"
    advice = "Lower model.rates.routers, give its stage more epochs, or take another model.router"
    limit = COLLAPSE_SHARE

    def look(self, looked: DepthShare) -> list[Sighting]:
        """A sighting if too many tokens of the input read one depth."""
        if looked.share <= self.limit:
            return []
        return [Sighting(looked.bits, looked.share, self.limit, looked.input)]

    def can_repair(self, module: ElasticCalibration, before: State | None) -> bool:
        """Always: its input can have static depths."""
        return True

    def repair(self, module: ElasticCalibration, before: State | None) -> None:
        """Changes nothing yet: the input gets its static depths as thresholds, which are tuned when all blocks are done."""
