"""What a report is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


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
        reason: Why it failed.
    """

    strategy: str
    seed: int
    folder: Path
    changes: Mapping[str, Any]
    status: Literal["finished", "failed"]
    seconds: float | None = None
    peak_memory_gb: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class ReportInput:
    """A comparison, finished as far as it came.

    Args:
        title: Heading.
        command: That made it.
        verdicts: What it says, in sentences; they come first.
        model: Name of the source model.
        protocol: As in results.json.
        environment: As in results.json.
        cells: In the order of the grid.
        table: Means at equal used bits: dicts strategy, allocation, used_bits, n, and mean and spread (None for one
            run) of perplexity and kl, as ``perplexity_mean`` and so on. Spread is the standard deviation over seeds.
        interpolation: How the table comes from measured points, in words.
    """

    title: str
    command: str
    verdicts: Sequence[str]
    model: str
    protocol: Mapping[str, Any]
    environment: Mapping[str, Any]
    cells: Sequence[ReportCell]
    table: Sequence[Mapping[str, Any]]
    interpolation: str
