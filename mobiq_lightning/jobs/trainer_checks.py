"""Settings of the trainer that would end a job in a traceback, or make it other than it seems: refused before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from mobiq_lightning.errors import MobiqError, RecipeError
from mobiq_lightning.jobs.trainer_values import trainer_problems


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Refuses settings of the trainer under which a run would not be what it says.

    Args:
        trainer: The keys of the recipe below ``trainer``, with their values.

    Raises:
        RecipeError: With one line for each.
    """
    if problems := trainer_problems({"default_root_dir": None, **trainer}):
        raise RecipeError("\n".join(problems))


@contextmanager
def trainer_errors(building: bool = False) -> Iterator[None]:
    """Within it, what Lightning finds wrong with the settings of the trainer is a `RecipeError`.

    Args:
        building: Whether the trainer is being built, where every error is one of its settings.
    """
    try:
        yield
    except (MobiqError, OSError):
        raise
    except Exception as error:
        if not building and not isinstance(error, MisconfigurationException):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        advice = " Without it, give --trainer.accelerator cpu" if "backend" in said or "not met" in said else ""
        raise RecipeError(f"trainer: {said}{advice}") from error
