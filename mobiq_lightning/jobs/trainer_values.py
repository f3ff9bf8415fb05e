"""Settings of the trainer that would end a job in a traceback, or make it other than it seems, told without importing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

MAX_EPOCHS = 1
"""What a recipe says of `trainer.max_epochs`; the callback `LayerwiseCalibration` sets the number of epochs."""


def _is_whole(part: Any) -> bool:
    return part is None or (isinstance(part, float) and part == 1.0)


def _is_below(low: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and value < low


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
    "accumulate_grad_batches": (_is_below(1), "give 1 or more"),
    "gradient_clip_val": (_is_below(0), "give 0 or more"),
    "val_check_interval": (
        lambda value: not _is_whole(value),
        "nothing is validated before all is calibrated; leave it out",
    ),
    "overfit_batches": (bool, "the comparison would be on calibration text; leave it out, or lower data.n_samples"),
    "devices": (lambda value: value in (0, "0", [], ""), "a run needs a device; give 1, or leave it out"),
}
"""By key of the trainer: whether a value is refused, and why or what to use."""


def trainer_problems(trainer: Mapping[str, Any]) -> list[str]:
    """A line for every setting of the trainer under which a run would not be what it says.

    Args:
        trainer: The keys of a recipe below ``trainer``, with their values.
    """
    return [
        f"trainer.{key}={trainer[key]}: {advice}"
        for key, (refused, advice) in _REFUSED.items()
        if key in trainer and refused(trainer[key])
    ]
