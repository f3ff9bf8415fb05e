"""The jobs as functions, `fit`, `validate`, `outliers` and `build`.

They return what they made, and raise a `MobiqError` where they cannot. What is wrong in a recipe is said before anything heavy is
imported.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from mobiq_lightning.extras import require
from mobiq_lightning.jobs.arguments import Recipe, command_line, with_recipe
from mobiq_lightning.jobs.recipe import check_arguments

if TYPE_CHECKING:
    from mobiq_lightning.jobs.cli import ElasticCLI
    from mobiq_lightning.runs import RunFolder


def fit(recipe: Recipe, *, overwrite: bool = False, **overrides: Any) -> RunFolder:
    """Calibrates slices and routers of a model, tunes thresholds, compares, and saves one elastic checkpoint.

    A run that was interrupted goes on; one that is finished is returned as it is.

    Args:
        recipe: Path of a recipe, name of a shipped one such as ``"tiny"``, or the content of one as a mapping.
        overwrite: Remove the run that the run folder holds.
        **overrides: Keys of the recipe with other values: ``model=dict(epochs_per_block=2)`` or
            ``**{"model.epochs_per_block": 2}``.

    Returns:
        The run folder, with results and checkpoint.

    Raises:
        RecipeError: If a key, a class or a value of the recipe cannot be used.
        RunFolderError: If the run folder holds another run.
        MobiqError: If the model, the text or the calibration itself fails; the message says how to go on.
    """
    return run_job("fit", [*command_line(recipe, overrides), *(["--overwrite"] if overwrite else [])])


def validate(recipe: Recipe, **overrides: Any) -> RunFolder:
    """Compares a finished run again, at other bits or on other text, and replaces its results.

    Args:
        recipe: The recipe of the run, or the run folder itself.
        **overrides: Keys of the recipe with other values, as in ``model=dict(eval_bits=[2.25, 3.25])``.

    Returns:
        The run folder.

    Raises:
        RecipeError: If a key, a class or a value of the recipe cannot be used.
        RunFolderError: If the run folder holds no finished run.
    """
    return run_job("validate", command_line(recipe, overrides))


def build(recipe: Recipe, **overrides: Any) -> ElasticCLI:
    """Builds model, data and trainer of a recipe, and leaves the run folder alone.

    Args:
        recipe: Path of a recipe, name of a shipped one, or the content of one as a mapping.
        **overrides: Keys of the recipe with other values.

    Returns:
        What was built, as `model`, `datamodule` and `trainer`.

    Raises:
        RecipeError: If a key, a class or a value of the recipe cannot be used.
    """
    arguments = command_line(recipe, overrides)
    check_arguments(arguments)
    from mobiq_lightning.jobs.cli import ElasticCLI
    from mobiq_lightning.jobs.quiet import quiet_libraries

    with quiet_libraries():
        return ElasticCLI("build", arguments)


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
    arguments = [*command_line(recipe, overrides), *(["--overwrite"] if overwrite else [])]
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
    arguments = with_recipe(arguments)
    check_arguments(arguments)
    from mobiq_lightning.jobs.outlier_study import OutlierStudy
    from mobiq_lightning.jobs.quiet import quiet_libraries

    with quiet_libraries(), interruptible():
        return OutlierStudy(arguments, bits, share).run()


def run_job(command: Literal["fit", "validate"], arguments: Sequence[str]) -> RunFolder:
    """Runs a job on a command line.

    Args:
        command: Which.
        arguments: What follows the command: the recipe, and keys that override it.

    Returns:
        The run folder.

    Raises:
        MobiqError: If the job cannot be done.
    """
    require("calibrate", command)
    arguments = with_recipe(arguments)
    check_arguments(arguments)
    from mobiq_lightning.jobs.cli import ElasticCLI
    from mobiq_lightning.jobs.quiet import quiet_libraries

    with quiet_libraries(), interruptible():
        return ElasticCLI(command, arguments).run()


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C within it is a `KeyboardInterrupt`, and works again afterwards: Lightning exits, and ignores the next ones."""
    here = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from end
        raise
    finally:
        if here and handler is not None:
            signal.signal(signal.SIGINT, handler)
