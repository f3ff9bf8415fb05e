"""The study of outliers as a function: it returns its run folder, and raises a `MobiqError` where it cannot be done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mobiq_lightning.console import say
from mobiq_lightning.errors import RecipeError, shown
from mobiq_lightning.extras import require
from mobiq_lightning.jobs.arguments import Recipe, command_line, overwrite_arguments, with_recipe
from mobiq_lightning.jobs.asked import asked_values, first_words
from mobiq_lightning.jobs.asked_checks import FILES
from mobiq_lightning.jobs.exit_codes import disk_errors
from mobiq_lightning.jobs.interruption import interruptible
from mobiq_lightning.jobs.recipe import check_arguments

if TYPE_CHECKING:
    from mobiq_lightning.runs import RunFolder

_MOST_BITS = 8
"""Bits of all slices together at most."""


def outliers(
    recipe: Recipe, *, bits: Sequence[int] = (), share: float = 0.1, overwrite: bool = False, **overrides: Any
) -> RunFolder:
    """Calibrates a model for each precision alone and for all at once, and reads each at all of them: which tokens suffer where.

    Args:
        recipe: Path of a recipe, name of a shipped one such as ``"outliers"``, or the content of one as a mapping.
        bits: Precisions in bits per weight; by default all depths of the slices.
        share: Part of the tokens that counts as worst, above 0 and below 1.
        overwrite: Remove the runs that the run folder holds.
        **overrides: Keys of the recipe with other values.

    Returns:
        The run folder, with outliers.json and a run folder for each calibration.

    Raises:
        RecipeError: If a key, a class or a value cannot be used.
        RunFolderError: If the run folder holds something else.
        MobiqError: If a calibration fails.
    """
    arguments = [*command_line(recipe, overrides), *overwrite_arguments(overwrite)]
    return run_outliers(arguments, bits, share)


def run_outliers(arguments: Sequence[str], bits: Sequence[int], share: float) -> RunFolder:
    """Runs the study of outliers on a command line.

    Args:
        arguments: The recipe, and keys that override it.
        bits: Precisions in bits per weight; empty for all depths of the slices.
        share: Part of the tokens that counts as worst.

    Returns:
        The run folder.

    Raises:
        MobiqError: If the study cannot be done.
    """
    require("calibrate", "outliers")
    if isinstance(bits, (str, bytes)) or not isinstance(bits, Sequence) or not all(_is_depth(b) for b in bits):
        raise RecipeError(f"outliers: bits {shown(bits)}; a list of whole numbers from 1 to {_MOST_BITS} is expected")
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise RecipeError(f"outliers: share ({shown(share)}) must be a number above 0 and below 1")
    arguments = with_recipe(arguments)
    check_arguments(arguments, FILES)
    say(first_words("outliers", asked_values(arguments)))
    kept = "finished runs and epochs are kept; the same command goes on"
    with interruptible(kept) as told, disk_errors(lambda: told.how_it_goes_on()):
        from mobiq_lightning.jobs.outlier_study import OutlierStudy
        from mobiq_lightning.jobs.quiet import quiet_libraries

        with quiet_libraries():
            return OutlierStudy(arguments, bits, share).run()


def _is_depth(value: object) -> bool:
    return type(value) is int and 1 <= value <= _MOST_BITS
