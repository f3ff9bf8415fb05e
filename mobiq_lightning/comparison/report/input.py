"""Defines the data that a report is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mobiq_lightning.comparison.table import TableRow
from mobiq_lightning.runs import EvalProtocol


@dataclass(frozen=True)
class ReportCell:
    """One run of a comparison, as the report shows it.

    Args:
        strategy: Name of the strategy.
        seed: Seed of the run.
        folder: The run folder, with results.json, diagnostics.json, metrics.jsonl.
        changes: Keys of the recipe that make the strategy, with their values.
        status: ``finished``, ``failed``, or ``damaged`` if it was finished and cannot be read; only finished runs are drawn, of
            the others the reason is shown.
        seconds: Seconds that the run took, if known.
        peak_memory_gb: Most memory that the run needed in GB, if known.
        resumed: Whether the run was resumed, if known; the seconds are then those of its last part alone.
        reason: Reason why the run failed or cannot be read.
    """

    strategy: str
    seed: int
    folder: Path
    changes: Mapping[str, Any]
    status: Literal["finished", "failed", "damaged"]
    seconds: float | None = None
    peak_memory_gb: float | None = None
    resumed: bool | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """The run as table.json has it, with time and memory if it is finished, and else with the reason."""
        found = {
            "strategy": self.strategy,
            "seed": self.seed,
            "changes": self.changes,
            "folder": str(self.folder),
            "status": self.status,
        }
        if self.status != "finished":
            return {**found, "reason": self.reason}
        return {**found, "seconds": self.seconds, "peak_memory_gb": self.peak_memory_gb, "resumed": self.resumed}


@dataclass(frozen=True)
class ReportInput:
    """All that a report says of a comparison, of which some cells may have failed.

    Args:
        title: Heading of the report.
        command: Command line that made the comparison.
        verdicts: Sentences on what was found; they come first.
        model: Name of the source model.
        protocol: Protocol of the evaluation: the text, the window, and how perplexity was measured.
        environment: Versions and machine that the comparison was measured with.
        cells: Runs, in the order of the grid.
        table: Rows of the long table, means at equal used bits.
        interpolation: Explanation in words of how the table comes from measured points.
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
