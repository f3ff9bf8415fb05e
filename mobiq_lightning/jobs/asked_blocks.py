"""The blocks that ``fit --blocks`` asks for, read and checked before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mobiq_lightning.errors import RecipeError, shown

_RANGE = re.compile(r"(?P<first>\d{1,6})(?:-(?P<last>\d{1,6}))?")


def asked_blocks(blocks: str, asked: Mapping[str, Any], overwrite: bool) -> range:
    """The blocks that a process is to calibrate alone, by index from 0.

    Args:
        blocks: What was asked for, as in ``1-8`` or ``3``: blocks are numbered from 1, as in all that is said of them.
        asked: Values of the recipe by dotted key.
        overwrite: Whether the run that the folder holds is to be removed.

    Raises:
        RecipeError: If it is no range of blocks, or the recipe does not calibrate blocks that do not depend on each other.
    """
    found = _RANGE.fullmatch(blocks) if isinstance(blocks, str) else None
    first = int(found["first"]) if found else 0
    last = int(found["last"] or first) if found else 0
    if not 1 <= first <= last:
        raise RecipeError(
            f"--blocks {shown(blocks)}: give the first and the last block, numbered from 1 as in the progress of a run: 1-8, or 3"
        )
    if (inputs := asked.get("model.block_inputs") or "calibrated") != "full":
        raise RecipeError(
            f"--blocks {blocks}: with model.block_inputs {inputs} a block is trained on what the blocks before it give, so that "
            "it cannot be calibrated without them. Set model.block_inputs to full, or leave out --blocks"
        )
    stages = asked.get("model.stages")
    begins = stages[0] if isinstance(stages, list) and stages else None
    if isinstance(begins, Mapping) and begins.get("scope") == "model":
        raise RecipeError(
            f"--blocks {blocks}: model.stages begins with a stage of the whole model, before which no block is calibrated by "
            "itself. Put block stages first, or leave out --blocks"
        )
    if overwrite:
        raise RecipeError(
            f"--blocks {blocks} with --overwrite would remove what other processes have calibrated of the run. Remove the run "
            "folder by hand before the first of them is started"
        )
    return range(first - 1, last)
