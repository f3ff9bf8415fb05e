"""What comparisons of one run have measured, put together: what is measured again replaces itself, all else stays."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mobiq_lightning.files import remove
from mobiq_lightning.runs.diagnostics import Diagnostics
from mobiq_lightning.runs.file_names import ELASTIC, OTHER_PROTOCOLS, RESULTS
from mobiq_lightning.runs.results import Addition, EvalProtocol, Measured, Results, read_results
from mobiq_lightning.runs.rows import CONTROLS, LABELS, Row

_OF_TEXT = ("data_hash", "n_windows", "n_tokens")
_OF_SCORING = ("eval_protocol", "window", "bos", "tokenizer")
"""Keys of a protocol that say what is scored and how; the others name it, or say what the run was calibrated on."""
_DRAWN = ("shuffled", "random")
"""Allocations that `model.random_seeds` draws: each seed is a row of its own."""
_LONGEST_NAME = 40


@dataclass(frozen=True)
class Basis:
    """What figures were measured on. Those of one table share it, or they would not compare.

    Args:
        protocol: The text, and how it is scored.
        threshold_scope: Table of thresholds that the router used; None if it is not known.
        dtype: The dtype of both models; None if it is not known.
        full_bits: Bits of a weight of the full-precision model; None if they are not known.
        checkpoint: Hash of what the checkpoint holds; None if it is not known.
    """

    protocol: EvalProtocol
    threshold_scope: str | None
    dtype: str | None
    full_bits: float | None
    checkpoint: str | None

    @classmethod
    def of(cls, measured: Measured) -> Basis:
        """What the rows of a comparison were measured on, as far as they say."""
        full = (row.target_bits for row in measured.rows if row.allocation == "full")
        scope = measured.slices.threshold_scope if measured.slices else None
        return cls(measured.protocol, scope, measured.dtype, next(full, None), measured.checkpoint)

    def differences(self, other: Basis) -> list[str]:
        """What another basis has instead, a clause each; what one of the two does not know counts as equal."""
        mine, others = self._compared(), other._compared()
        differing = [k for k in mine if None not in (mine[k], others[k]) and mine[k] != others[k]]
        text = [f"{other._text} (not {self._text})"] if any(key in _OF_TEXT for key in differing) else []
        rest = [key for key in differing if key not in _OF_TEXT]
        return text + [f"{key.replace('_', ' ')} {others[key]} (not {mine[key]})" for key in rest]

    def is_of_checkpoint(self, other: Basis) -> bool:
        """Whether both are of the same checkpoint, as far as both say."""
        return None in (self.checkpoint, other.checkpoint) or self.checkpoint == other.checkpoint

    @property
    def folder_name(self) -> str:
        """Name of a folder for results on this text and protocol: the text's name, the window, and a hash of all that counts."""
        digest = hashlib.sha256(json.dumps(self._compared()).encode()).hexdigest()[:8]
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(self.protocol.data).stem).strip("-")[:_LONGEST_NAME] or "text"
        return f"{name}-window-{self.protocol.window}-{digest}"

    @property
    def _text(self) -> str:
        protocol = self.protocol
        return f"{Path(protocol.data).name}, tokens {protocol.data_hash}, {protocol.n_tokens} of them scored"

    def _compared(self) -> dict[str, Any]:
        of_text = {key: getattr(self.protocol, key) for key in (*_OF_TEXT, *_OF_SCORING)}
        how = {"threshold_scope": self.threshold_scope, "dtype": self.dtype, "full_bits": self.full_bits}
        return {**of_text, **how}


def known_results(run: Path) -> Results:
    """What a run folder's results.json holds, or that of its checkpoint where the run has none.

    Raises:
        ResultsError: If the file is damaged or from another version.
    """
    of_run = run / RESULTS
    return read_results(of_run if of_run.is_file() else run / ELASTIC / RESULTS)


def check_results(run: Path) -> None:
    """Reads all results that a comparison may add to, so that damage is found before it begins.

    Raises:
        ResultsError: If a file is damaged or from another version.
    """
    known_results(run)
    for path in sorted((run / OTHER_PROTOCOLS).glob(f"*/{RESULTS}")):
        read_results(path)


def place_of(run: Path, basis: Basis) -> Path:
    """The folder that results on a basis belong to: the run folder, or one in it for another text or protocol.

    Args:
        run: The run folder. What it holds of another checkpoint, from before this one was built, does not count.
        basis: What is measured on.

    Raises:
        ResultsError: If the results of the run are damaged or from another version.
    """
    known = known_results(run).measured
    if known is None or not Basis.of(known).is_of_checkpoint(basis) or not Basis.of(known).differences(basis):
        return run
    return run / OTHER_PROTOCOLS / basis.folder_name


def merged(known: Measured | None, new: Measured) -> Measured:
    """The rows of two comparisons on the same basis as one.

    A row replaces the one of the same allocation and budget, and where a seed draws it, of the same seed; all other known
    rows stay. `additions` then says which budgets were measured when.

    Args:
        known: What was measured before; None if nothing was.
        new: What was measured now.
    """
    again = {_identity(row) for row in new.rows}
    kept = [row for row in known.rows if _identity(row) not in again] if known else []
    if known is None or not kept:
        return new
    rows = sorted([*kept, *new.rows], key=_order)
    budgets = budgets_of(new.rows)
    earlier = (replace(a, budgets=tuple(b for b in a.budgets if b not in budgets)) for a in known.additions or ())
    additions = (*(a for a in earlier if a.budgets), Addition(new.environment, tuple(budgets)))
    return replace(
        new,
        model=known.model,
        protocol=known.protocol,
        environment=known.environment,
        rows=tuple(rows),
        additions=additions,
    )


def budgets_of(rows: Sequence[Row]) -> list[float]:
    """The budgets that rows of the router are of, ascending."""
    return sorted({row.target_bits for row in rows if row.allocation == "router"})


def drop_stale(run: Path, basis: Basis) -> None:
    """Removes results on other texts that are of another checkpoint than the one which was compared just now."""
    for path in sorted((run / OTHER_PROTOCOLS).glob(f"*/{RESULTS}")):
        measured = read_results(path).measured
        if measured is not None and not Basis.of(measured).is_of_checkpoint(basis):
            remove(path.parent)


def merged_diagnostics(known: Diagnostics, new: Diagnostics) -> Diagnostics | None:
    """What routers do at the budgets of both, the newer ones replacing the same budgets; None if they are of other inputs."""
    if (known.inputs, known.depths) != (new.inputs, new.depths):
        return None
    budgets = {budget.target_bits: budget for budget in (*known.budgets, *new.budgets)}
    return replace(new, budgets=tuple(budgets[bits] for bits in sorted(budgets)))


def merged_speed(known: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any] | None:
    """Content of speed.json with what stays of its former one: the budgets beyond those that were measured now.

    Between two budgets speed is interpolated, and rows of different times, when a machine was more or less busy, make no curve:
    a lower budget would seem slower than a higher one.

    Returns:
        None if the former one is of another machine or path.
    """
    places = [(stored["environment"]["device"], stored["environment"].get("path", "")) for stored in (known, new)]
    if places[0] != places[1]:
        return None
    now = [row["bits"] for row in new["rows"]]
    stay = [row for row in known["rows"] if now and not min(now) <= row["bits"] <= max(now)]
    return {**new, "rows": sorted([*stay, *new["rows"]], key=lambda row: row["bits"])}


def _identity(row: Row) -> tuple[Any, ...]:
    """What makes a row the same as another one: measured again, it takes its place."""
    return row.allocation, row.target_bits, row.seed if row.allocation in _DRAWN else None


def _order(row: Row) -> tuple[Any, ...]:
    """Where a row stands: allocations one after the other, and then the controls, budget by budget."""
    number = list(LABELS).index(row.allocation)
    return (1, row.target_bits, number) if row.allocation in CONTROLS else (0, number, row.target_bits)
