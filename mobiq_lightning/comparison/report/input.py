"""What a report is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mobiq_lightning.comparison.table import TableRow
from mobiq_lightning.runs import EvalProtocol


@dataclass(frozen=True)
class ReportCell:
    """One run of a comparison.

    Args:
        strategy: Its name.
        seed: Of the run.
        folder: The run folder, with results.json, diagnostics.json, metrics.jsonl.
        changes: Keys of the recipe that make the strategy.
        status: Only finished cells are drawn; of failed ones the reason is shown.
        seconds: That it took, if known.
        peak_memory_gb: That it needed, if known.
        resumed: Whether it was resumed, if known; the seconds are then those of its last part alone.
        reason: Why it failed.
    """

    strategy: str
    seed: int
    folder: Path
    changes: Mapping[str, Any]
    status: Literal["finished", "failed"]
    seconds: float | None = None
    peak_memory_gb: float | None = None
    resumed: bool | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """The run as table.json has it: of a finished one what it took, of a failed one why."""
        found = {
            "strategy": self.strategy,
            "seed": self.seed,
            "changes": self.changes,
            "folder": str(self.folder),
            "status": self.status,
        }
        if self.status == "failed":
            return {**found, "reason": self.reason}
        return {**found, "seconds": self.seconds, "peak_memory_gb": self.peak_memory_gb, "resumed": self.resumed}


@dataclass(frozen=True)
class ReportInput:
    """A comparison, finished as far as it came.

    Args:
        title: Heading.
        command: That made it.
        verdicts: What it says, in sentences; they come first.
        model: Name of the source model.
        protocol: How perplexity was measured, and on what.
        environment: Versions and machine that it was measured with.
        cells: In the order of the grid.
        table: Means at equal used bits.
        interpolation: How the table comes from measured points, in words.
    """

    title: str
    command: str
    verdicts: Sequence[str]
    model: str
    protocol: EvalProtocol
    environment: Mapping[str, str]
    cells: Sequence[ReportCell]
    table: Sequence[TableRow]
    interpolation: str
