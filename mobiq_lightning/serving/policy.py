"""Chooses bits from load: fewer at peak, more off-peak, without flapping in between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mobiq_lightning.errors import CheckpointError, RecipeError, shown


@dataclass(frozen=True)
class CurvePoint:
    """What was measured at one budget: a point of the curve that a policy chooses from.

    Args:
        bits: Bits per weight asked for.
        perplexity: Perplexity at that budget.
        tokens_per_second: Speed at that budget on the machine that serves, or None if it was not measured.
    """

    bits: float
    perplexity: float
    tokens_per_second: float | None = None


class BitsPolicy:
    """Chooses the bits to run at from the length of a queue, or from the speed that is wanted.

    Only budgets that are worth it count as levels: those within the quality floor, of two that are as good only the cheaper
    one, and of two that are as fast only the better one: where fewer bits are no faster, as on a CPU, they would cost quality
    for nothing. When load rises, bits fall at once; they rise again only when load has fallen by `margin` below the point
    where they fell, so that a load that hovers around that point does not turn the dial back and forth.

    Not for use by several threads at once; give each model its own.

    Args:
        curve: Budgets with the perplexity and speed that were measured at them.
        off_peak_queue: Queue length up to which the most bits are used.
        peak_queue: Queue length from which the fewest bits are used; in between level follows level.
        lowest_bits: Fewest bits per weight that may be chosen.
        highest_bits: Most bits per weight that may be chosen.
        max_perplexity_ratio: Quality floor: the largest perplexity that may be chosen, as a multiple of the curve's
            best.
        tie: Relative difference in perplexity below which two budgets are as good.
        speed_tie: Relative difference in speed below which two budgets are as fast, where the curve holds all speeds.
        margin: Hysteresis, as a share of the load.

    Raises:
        RecipeError: If an argument makes no sense, or no budget of the curve is within the limits.
    """

    def __init__(
        self,
        curve: Sequence[CurvePoint],
        off_peak_queue: float = 1,
        peak_queue: float = 16,
        lowest_bits: float = 0.0,
        highest_bits: float = 8.0,
        max_perplexity_ratio: float = 2.0,
        tie: float = 0.002,
        speed_tie: float = 0.1,
        margin: float = 0.25,
    ) -> None:
        settings = {
            "off_peak_queue": off_peak_queue,
            "peak_queue": peak_queue,
            "lowest_bits": lowest_bits,
            "margin": margin,
        }
        settings |= {"highest_bits": highest_bits, "max_perplexity_ratio": max_perplexity_ratio, "tie": tie}
        settings["speed_tie"] = speed_tie
        for name, value in settings.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise RecipeError(f"{name} ({shown(value)}) must be a finite number")
        if not isinstance(curve, Sequence) or not all(map(_usable, curve)):
            raise RecipeError(
                f"curve {shown(curve)}: a list of CurvePoint is expected, with finite bits and perplexities above 0"
            )
        if not 0 <= off_peak_queue < peak_queue:
            raise RecipeError(f"off_peak_queue ({off_peak_queue}) must be below peak_queue ({peak_queue})")
        if not 0 <= margin < 1:
            raise RecipeError(f"margin ({margin}) must lie in [0, 1)")
        best = min((point.perplexity for point in curve), default=0.0)
        allowed = [
            p
            for p in sorted(curve, key=lambda p: p.bits)
            if lowest_bits <= p.bits <= highest_bits and p.perplexity <= best * max_perplexity_ratio
        ]
        levels: list[CurvePoint] = []
        for point in allowed:  # cheapest first; each further one must be better than all before it
            if not levels or point.perplexity < levels[-1].perplexity * (1 - tie):
                levels.append(point)
        if not levels:
            raise RecipeError(
                f"no budget of the curve lies within {lowest_bits:g} to {highest_bits:g} bits and within "
                f"{max_perplexity_ratio:g} times the best perplexity ({best:.4g}); relax one of them"
            )
        self.levels = _faster_and_faster(levels[::-1], speed_tie)
        """Budgets that are used, most bits first."""
        self.no_faster = [level.bits for level in levels[::-1] if level not in self.levels]
        """Budgets in bits that are good enough but no faster than a level with more bits, so that they are not used."""
        self.off_peak_queue, self.peak_queue, self.margin = off_peak_queue, peak_queue, margin
        self.level = 0
        self.saturated = False
        """Whether even the fewest bits are too slow for the speed that was asked for last."""
        self.no_speed = "the curve holds no speeds at some of its bits"
        """The reason why speeds are missing, where they are; bits for a queue length are chosen without them."""

    @classmethod
    def from_checkpoint(cls, folder: str | Path, **settings: Any) -> BitsPolicy:
        """Makes a policy from curves stored with a checkpoint: results.json, and speed.json if it is of this machine.

        Budgets above what the checkpoint holds are left out.

        Args:
            folder: Run folder or elastic checkpoint.
            **settings: Further arguments of the class.

        Raises:
            CheckpointError: If the checkpoint holds no rows of a comparison.
            ResultsError: If a file with what was measured is damaged or from another version.
        """
        from mobiq_lightning.checkpoint import own_file, read_config, resolve
        from mobiq_lightning.environment import device_name
        from mobiq_lightning.runs import RESULTS, SPEED, SpeedNote, read_json, read_results

        path = resolve(folder)
        for name in (RESULTS, SPEED):
            if (path / name).exists():
                own_file(path, name)
        measured = read_results(path / RESULTS).measured
        if measured is None:
            found = f"holds no rows of a comparison in {RESULTS}" if (path / RESULTS).is_file() else f"has no {RESULTS}"
            raise CheckpointError(f"{path} {found}, so what bits buy is unknown; run `validate` with its recipe")
        held = read_config(path)[1].n_planes  # fewer than were measured where only the first planes were exported
        speed: dict[float, float] = {}
        elsewhere = ""
        if (path / SPEED).is_file():
            stored = SpeedNote.from_json(read_json(path / SPEED), path / SPEED)
            measured_on = stored.environment.device
            if measured_on == device_name():
                speed = {row.bits: row.tokens_per_second for row in stored.rows}
            else:
                elsewhere = f"{path / SPEED} was measured on {measured_on}, this is {device_name()}"
        curve = [
            CurvePoint(row.target_bits, row.perplexity, _interpolated(speed, row.target_bits))
            for row in measured.rows
            if row.allocation == "router" and row.finite and row.target_bits <= held
        ]
        policy = cls(curve, **settings)
        policy.no_speed = elsewhere or policy.no_speed
        return policy

    @property
    def bits(self) -> float:
        """The bits per weight that were chosen last; at first the most."""
        return self.levels[self.level].bits

    def bits_for_queue(self, queue_length: float) -> float:
        """Chooses the bits per weight to run at while `queue_length` requests wait."""
        wanted = sum(queue_length >= point for point in self.switching_points)
        if wanted > self.level:
            self.level = wanted
        while self.level > wanted and queue_length < self.switching_points[self.level - 1] * (1 - self.margin):
            self.level -= 1
        return self.bits

    @property
    def switching_points(self) -> list[float]:
        """The queue lengths from which levels 1, 2, ... are used; level 0 has the most bits."""
        last = len(self.levels) - 1
        span = self.peak_queue - self.off_peak_queue
        return [self.off_peak_queue + span * level / last for level in range(1, last + 1)]

    def bits_for_speed(self, tokens_per_second: float) -> float:
        """Chooses the most bits per weight that give `tokens_per_second`.

        If none do, the fewest bits are chosen and `saturated` becomes true.

        Raises:
            RecipeError: If the speed of a level was not measured.
        """
        speeds = [level.tokens_per_second for level in self.levels]
        known = [speed for speed in speeds if speed is not None]
        if len(known) < len(speeds):
            raise RecipeError(
                f"{self.no_speed}; measure them on this machine with `validate` or mobiq_lightning.serving.measure_speed, "
                "or use bits_for_queue"
            )
        enough = [index for index, speed in enumerate(known) if speed >= tokens_per_second]
        self.saturated = not enough
        wanted = enough[0] if enough else len(known) - 1
        if wanted > self.level:
            self.level = wanted
        while self.level > wanted and known[self.level - 1] >= tokens_per_second * (1 + self.margin):
            self.level -= 1
        return self.bits


def _faster_and_faster(levels: list[CurvePoint], tie: float) -> list[CurvePoint]:
    """The levels, most bits first, without those that are no faster than one with more bits; all if a speed is unknown."""
    kept: list[CurvePoint] = []
    for level in levels:
        before = kept[-1].tokens_per_second if kept else 0.0
        if level.tokens_per_second is None or before is None:
            return levels
        if not kept or level.tokens_per_second > before * (1 + tie):
            kept.append(level)
    return kept


def _usable(point: Any) -> bool:
    """Whether something is a point of a curve that can be compared with others."""
    return isinstance(point, CurvePoint) and all(
        isinstance(value, (int, float)) and 0 < value < math.inf for value in (point.bits, point.perplexity)
    )


def _interpolated(speed: dict[float, float], bits: float) -> float | None:
    """Speed at a budget, linear between the measured ones; None outside of them."""
    if bits in speed:
        return speed[bits]
    for low, high in pairwise(sorted(speed)):
        if low < bits < high:
            return speed[low] + (speed[high] - speed[low]) * (bits - low) / (high - low)
    return None
