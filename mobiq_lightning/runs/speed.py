"""How fast a model decodes at each budget: speed.json of a checkpoint, and what results.json says of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from mobiq_lightning.runs.record import Record, at_least
from mobiq_lightning.runs.rows import MOST_BITS


@dataclass(frozen=True)
class SpeedRow(Record):
    """How fast a model decodes at one budget.

    Args:
        bits: Bits per weight that were asked for.
        used_bits: Mean code bits per weight that tokens read.
        tokens_per_second: Tokens decoded in a second, all rows of the batch together.
    """

    bits: float = field(metadata=at_least(0, MOST_BITS))
    used_bits: float = field(metadata=at_least(0, MOST_BITS))
    tokens_per_second: float = field(metadata=at_least(0))


@dataclass(frozen=True)
class SpeedPlace(Record):
    """Where speed was measured; the file holds versions beside it.

    Args:
        device: Name of the GPU or processor.
    """

    device: str


@dataclass(frozen=True)
class SpeedNote(Record):
    """What is read of speed.json.

    Args:
        environment: Where it was measured.
        rows: A row for each budget.
    """

    environment: SpeedPlace
    rows: tuple[SpeedRow, ...]


@dataclass(frozen=True)
class BudgetSpeed(Record):
    """What results.json says of the speed at one budget.

    Args:
        target_bits: Bits per weight that were asked for.
        used_bits: Mean code bits per weight that tokens read.
        us: Microseconds that all linears of the model take for one token.
        gb_per_s: Gigabytes of weights that are read in a second.
        of_copy: That rate as a share of the copy bandwidth.
        times_plain: How many times as fast as plain weights.
        tokens_per_second: Tokens decoded in a second; None if that was not measured.
    """

    target_bits: float = field(metadata=at_least(0, MOST_BITS))
    used_bits: float = field(metadata=at_least(0, MOST_BITS))
    us: float = field(metadata=at_least(0))
    gb_per_s: float = field(metadata=at_least(0))
    of_copy: float = field(metadata=at_least(0))
    times_plain: float = field(metadata=at_least(0))
    tokens_per_second: float | None = field(metadata=at_least(0))


@dataclass(frozen=True)
class LatencyNote(Record):
    """What is read of `latency` in results.json, which holds more.

    Args:
        device: Name of the GPU or processor.
        what: What was timed, in words.
        plain: The dtype of the plain weights that it is compared with.
        budgets: A row for each budget.
    """

    device: str
    what: str
    plain: str
    budgets: tuple[BudgetSpeed, ...]
