"""diagnostics.json: what the routers of a run do with the evaluation text, and how good its blocks are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mobiq_lightning.errors import ResultsError, shown
from mobiq_lightning.runs.record import Record, at_least, read_json
from mobiq_lightning.runs.rows import MOST_BITS


@dataclass(frozen=True)
class InputSize(Record):
    """An input, by the name of the first linear that reads it.

    Args:
        name: Name of that linear.
        weights: Weights that read the input.
    """

    name: str
    weights: int = field(metadata=at_least(1))


@dataclass(frozen=True)
class ClassUse(Record):
    """What tokens of one class read.

    Args:
        name: Positions in the window, or occurrences in the text, in words, as in ``4-7``.
        tokens: Tokens of the class.
        bits: Mean bits that they read.
    """

    name: str = field(metadata={"key": "class"})
    tokens: float = field(metadata=at_least(0))
    bits: float = field(metadata=at_least(0, MOST_BITS))


@dataclass(frozen=True)
class BudgetUse(Record):
    """What the routers did at one budget.

    Args:
        target_bits: Bits per weight that were asked for.
        mean_bits: For each input, the mean bits that tokens read.
        depth_share: For each input, the share of tokens that read each depth.
        by_position: Bits by the token's position in the window.
        by_frequency: Bits by how often the token occurs in the text.
    """

    target_bits: float = field(metadata=at_least(0, MOST_BITS))
    mean_bits: tuple[float, ...] = field(metadata=at_least(0, MOST_BITS))
    depth_share: tuple[tuple[float, ...], ...] = field(metadata=at_least(0, 1 + 1e-6))
    by_position: tuple[ClassUse, ...]
    by_frequency: tuple[ClassUse, ...]


@dataclass(frozen=True)
class BlockErrorNote(Record):
    """How far each elastic block alone is from the full-precision one.

    Args:
        tokens: Tokens that the errors are means of.
        relative_error: For each block, its relative squared error at each depth.
    """

    tokens: int = field(metadata=at_least(0))
    relative_error: tuple[tuple[float, ...], ...] = field(metadata=at_least(0, finite=False))


@dataclass(frozen=True)
class Diagnostics(Record):
    """Content of diagnostics.json.

    Args:
        inputs: Inputs, in the order of the model.
        depths: Depths that tokens can read, in bits, ascending.
        budgets: What the routers did at each budget.
        block_error: Error of each block at each depth.
    """

    inputs: tuple[InputSize, ...]
    depths: tuple[int, ...] = field(metadata=at_least(1, MOST_BITS))
    budgets: tuple[BudgetUse, ...]
    block_error: BlockErrorNote

    @property
    def shape(self) -> tuple[int, ...]:
        """Numbers of inputs, depths, budgets and blocks."""
        return len(self.inputs), len(self.depths), len(self.budgets), len(self.block_error.relative_error)


def read_diagnostics(path: Path) -> Diagnostics:
    """What a diagnostics.json holds.

    Raises:
        ResultsError: If it is missing, damaged or from another version, or its tables do not fit each other.
    """
    found = Diagnostics.from_json(read_json(path), path)
    wrong = next(_misfits(found), "")
    if wrong:
        raise ResultsError(f"{path}: {wrong}; the file is damaged: restore it, or run `validate` again")
    return found


def _misfits(found: Diagnostics) -> Iterator[str]:
    """What does not fit each other, one sentence each."""
    inputs, depths, budgets, blocks = found.shape
    if not (inputs and depths and budgets and blocks):
        yield f"{inputs} inputs, {depths} depths, {budgets} budgets and {blocks} blocks; at least one of each is expected"
    if list(found.depths) != sorted(set(found.depths)):
        yield f"depths {list(found.depths)} do not rise"
    if len({budget.target_bits for budget in found.budgets}) < budgets:
        yield "a budget is there twice"
    for budget in found.budgets:
        where = f"at {budget.target_bits:g} bits"
        if len(budget.mean_bits) != inputs or len(budget.depth_share) != inputs:
            yield f"{where}: figures of {len(budget.mean_bits)} and {len(budget.depth_share)} inputs, not of {inputs}"
        if any(len(share) != depths for share in budget.depth_share):
            yield f"{where}: shares of other than {depths} depths"
        for classes in (budget.by_position, budget.by_frequency):
            if classes and not sum(c.tokens for c in classes) > 0:
                yield f"{where}: classes without tokens"
            if wrong := [c.name for c in classes if not re.match(r"[0-9]{1,9}(?![0-9])", c.name)]:
                yield f"{where}: no class is called {shown(wrong[0])}"
    if any(len(errors) != depths for errors in found.block_error.relative_error):
        yield f"block errors at other than {depths} depths"
