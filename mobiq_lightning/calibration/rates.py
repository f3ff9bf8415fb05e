"""Learning rates of a calibration, one for each kind of thing that is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mobiq_lightning.nn import CalibratedBlock, Learned
from mobiq_lightning.strategies.numbers import in_range

KINDS: tuple[Learned, ...] = ("ranges", "codes", "transforms", "routers")
"""What a calibration learns, in the order of the optimizer's groups."""


@dataclass(frozen=True)
class Rates:
    """Learning rates of a stage: highest at its beginning, or after a warm-up, and falling along half a cosine.

    Args:
        ranges: Learning rate of the quantization ranges of the slice scheme.
        codes: Learning rate of the codes, in the unit of the weights; used by stages that train `codes`.
        transforms: Learning rate of what the transform learns.
        routers: Learning rate of the routers.
        warmup: Part of the steps of a stage, in [0, 1], over which the rates rise from nothing. AdamW's first steps are of full
            size in every weight, whatever its gradient: without a warm-up a stage of the whole model begins by undoing what
            was reached, and a short one does not make up for it.
    """

    ranges: float = 5e-3
    codes: float = 1e-3
    transforms: float = 5e-3
    routers: float = 1e-3
    warmup: float = 0.0

    def __post_init__(self) -> None:
        in_range("model.rates.warmup", self.warmup, 0, 1)
        for kind in KINDS:
            in_range(f"model.rates.{kind}", getattr(self, kind), 0, 1e6, above=True)

    def share(self, position: float, steps: int) -> float:
        """The share of the rates that a step takes: it rises over the warm-up, and falls along half a cosine.

        Args:
            position: How far the stage is before the step, in [0, 1]: 0 at the first step, 1 at the last.
            steps: Steps of the stage.
        """
        rising = self.warmup * steps
        risen = min(1.0, (position * (steps - 1) + 1) / rising) if rising > 1 else 1.0
        return risen * (1 + math.cos(math.pi * position)) / 2


def parameter_groups(blocks: Sequence[CalibratedBlock], rates: Rates) -> list[dict[str, Any]]:
    """Groups for an optimizer, one for each kind of which there is something to learn, in the order of `KINDS`.

    Args:
        blocks: What is learned of all blocks.
        rates: The learning rates; each group keeps its own as ``full_lr`` while ``lr`` falls.
    """
    groups: list[dict[str, Any]] = []
    for kind in KINDS:
        learned, rate = [p for block in blocks for p in block.parameters_of(kind)], getattr(rates, kind)
        groups += [{"name": kind, "params": learned, "lr": rate, "full_lr": rate}] if learned else []
    return groups
