"""speed.json of a checkpoint: how fast it decodes at each budget, and where that was measured."""

from __future__ import annotations

from dataclasses import dataclass

from mobiq_lightning.runs.record import Record


@dataclass(frozen=True)
class SpeedRow(Record):
    """How fast a model decodes at one budget.

    Args:
        bits: Bits per weight that were asked for.
        used_bits: Mean code bits per weight that tokens read.
        tokens_per_second: Tokens decoded in a second, all rows of the batch together.
    """

    bits: float
    used_bits: float
    tokens_per_second: float


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
