"""Settings of the trainer that would end a job in a traceback, or make it other than it seems: refused before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from mobiq_lightning.errors import MobiqError, RecipeError

MAX_EPOCHS = 1
"""What a recipe says of `trainer.max_epochs`; the callback `LayerwiseCalibration` sets the number of epochs."""


def _is_whole(part: Any) -> bool:
    return part is None or (isinstance(part, float) and part == 1.0)


_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "default_root_dir": (lambda value: value in (None, ""), "it is empty; give the folder of the run"),
    "precision": (
        lambda value: str(value) not in ("None", "32", "32-true"),
        "what is learned is float32, and the model computes in model.dtype; leave it out, or set model.dtype",
    ),
    "barebones": (bool, "a run needs its callbacks, loggers and checkpoints; leave it out"),
    "enable_checkpointing": (
        lambda value: value is False,
        "a run goes on, and starts a block anew, from its training checkpoints; leave it out (three are kept)",
    ),
    "max_epochs": (
        lambda value: value not in (None, MAX_EPOCHS),
        "how many epochs there are follows from model.epochs_per_block and model.stages; leave it out",
    ),
    "limit_train_batches": (lambda value: not _is_whole(value), "give fewer windows with data.n_samples"),
    "limit_val_batches": (lambda value: not _is_whole(value), "give fewer windows with data.eval_max_windows"),
    "accumulate_grad_batches": (lambda value: isinstance(value, int) and value < 1, "give 1 or more"),
    "gradient_clip_val": (lambda value: value is not None and value < 0, "give 0 or more"),
    "val_check_interval": (
        lambda value: not _is_whole(value),
        "nothing is validated before all is calibrated; leave it out",
    ),
    "overfit_batches": (bool, "the comparison would be on calibration text; leave it out, or lower data.n_samples"),
}
"""By key of the trainer: whether a value is refused, and why or what to use."""


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Refuses settings of the trainer under which a run would not be what it says.

    Args:
        trainer: The keys of the recipe below ``trainer``, with their values.

    Raises:
        RecipeError: With one line for each.
    """
    problems = [
        f"trainer.{key}={value}: {advice}"
        for key, (refused, advice) in _REFUSED.items()
        if refused(value := trainer.get(key))
    ]
    if problems:
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
