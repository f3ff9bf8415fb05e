"""The jobs as functions: `fit`, `validate` and `build`.

They return what they made, and raise a `MobiqError` where they cannot. What is wrong in a recipe is said before anything heavy is
imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from mobiq_lightning.console import is_first_process, say
from mobiq_lightning.extras import require
from mobiq_lightning.jobs.arguments import Recipe, command_line, overwrite_arguments, with_recipe
from mobiq_lightning.jobs.asked import asked_values, first_words, without_effect
from mobiq_lightning.jobs.asked_blocks import asked_blocks
from mobiq_lightning.jobs.asked_checks import FILES
from mobiq_lightning.jobs.exit_codes import disk_errors
from mobiq_lightning.jobs.interruption import interruptible
from mobiq_lightning.jobs.recipe import check_arguments
from mobiq_lightning.runs import RunFolder

if TYPE_CHECKING:
    from mobiq_lightning.jobs.cli import ElasticCLI


def fit(recipe: Recipe, *, overwrite: bool = False, blocks: str | None = None, **overrides: Any) -> RunFolder:
    """Calibrates slices and routers of a model, tunes thresholds, compares, and saves one elastic checkpoint.

    A run that was interrupted goes on; one that is finished is returned as it is.

    Args:
        recipe: Path of a recipe, name of a shipped one such as ``"tiny"``, or the content of one as a mapping.
        overwrite: Remove the run that the run folder holds.
        blocks: Decoder blocks, numbered from 1, as in ``"1-8"`` or ``"3"``, to calibrate alone and leave in the run folder, while
            other processes do the same with others; empty: all, and what follows. Takes ``block_inputs`` ``full``.
        **overrides: Keys of the recipe with other values: ``model=dict(eval_bits=[2, 3, 4])`` or
            ``**{"model.eval_bits": [2, 3, 4]}``.

    Returns:
        The run folder, with results and checkpoint unless blocks alone are asked for.

    Raises:
        RecipeError: If a key, a class or a value of the recipe cannot be used.
        RunFolderError: If the run folder holds another run, or another process is at work in it or on these blocks.
        MobiqError: If the model, the text or the calibration itself fails; the message says how to go on.
    """
    return run_job("fit", [*command_line(recipe, overrides), *overwrite_arguments(overwrite)], blocks)


def validate(recipe: Recipe, **overrides: Any) -> RunFolder:
    """Compares a finished run again, at other bits or on other text.

    Rows of the same text and protocol are put into results.json: a budget that is measured again replaces itself, all others
    stay, and so do diagnostics; speed is measured at all of them. What is measured on another text, window, threshold scope
    or dtype is written beside, into a folder of ``other_protocols/``, and changes nothing of what the checkpoint says of
    itself.

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


def run_job(command: Literal["fit", "validate"], arguments: Sequence[str], blocks: str | None = None) -> RunFolder:
    """Runs a job on a command line.

    Args:
        command: Which.
        arguments: What follows the command: the recipe, and keys that override it.
        blocks: Blocks to calibrate alone, as `fit` takes them; None: all.

    Returns:
        The run folder.

    Raises:
        MobiqError: If the job cannot be done.
    """
    require("calibrate", command)
    arguments = with_recipe(arguments)
    check_arguments(arguments, FILES if command == "fit" else [key for key in FILES if key != "data.source"])
    asked = asked_values(arguments)
    own = asked_blocks(blocks, asked, "--overwrite" in arguments) if blocks is not None else None
    folder = asked.get("trainer.default_root_dir")
    if isinstance(folder, str) and "$" not in folder and is_first_process() and own is None:
        RunFolder(folder).check_place()
    say(first_words(command, asked))
    for line in without_effect(asked) if command == "fit" else ():
        say(line)
    with (
        interruptible("its work had not begun") as told,
        disk_errors(lambda: told.how_it_goes_on()),
    ):
        from mobiq_lightning.jobs.cli import ElasticCLI
        from mobiq_lightning.jobs.quiet import quiet_libraries

        with quiet_libraries():
            job = ElasticCLI(command, arguments, own)
            told.how_it_goes_on = job.how_it_goes_on
            return job.run()
