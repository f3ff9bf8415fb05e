"""diagnostics.json: what the routers of a run do with the evaluation text, and how good its blocks are."""

from __future__ import annotations

from dataclasses import dataclass, field

from mobiq_lightning.runs.record import Record


@dataclass(frozen=True)
class InputSize(Record):
    """An input, by the name of the first linear that reads it.

    Args:
        name: Name of that linear.
        weights: Weights that read the input.
    """

    name: str
    weights: int


@dataclass(frozen=True)
class ClassUse(Record):
    """What tokens of one class read.

    Args:
        name: Positions in the window, or occurrences in the text, in words, as in ``4-7``.
        tokens: Tokens of the class.
        bits: Mean bits that they read.
    """

    name: str = field(metadata={"key": "class"})
    tokens: float
    bits: float


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

    target_bits: float
    mean_bits: tuple[float, ...]
    depth_share: tuple[tuple[float, ...], ...]
    by_position: tuple[ClassUse, ...]
    by_frequency: tuple[ClassUse, ...]


@dataclass(frozen=True)
class BlockErrorNote(Record):
    """How far each elastic block alone is from the full-precision one.

    Args:
        tokens: Tokens that the errors are means of.
        relative_error: For each block, its relative squared error at each depth.
    """

    tokens: int
    relative_error: tuple[tuple[float, ...], ...]


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
    depths: tuple[int, ...]
    budgets: tuple[BudgetUse, ...]
    block_error: BlockErrorNote
