"""How the keys of a recipe are parsed: defaults of the trainer, and errors in a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from mobiq_lightning.errors import RecipeError
from mobiq_lightning.jobs.trainer_checks import MAX_EPOCHS

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs/elastic",
    "devices": 1,
    "max_epochs": MAX_EPOCHS,  # LayerwiseCalibration sets it to blocks times epochs per block
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the data module shares windows out among ranks itself
}
"""Settings of the trainer where a recipe says nothing."""


class RecipeParser(LightningArgumentParser):
    """Says what is wrong in a few lines instead of a page of usage, and takes no abbreviated keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Turns whatever the parser finds into a `RecipeError`."""
        if "are required" in message:
            message += ". Give a recipe, as in --config recipes/tiny.yaml"
        raise RecipeError(message) from ex


def with_whole_stages(arguments: Sequence[str]) -> list[str]:
    """Arguments under which stages replace those of the recipe; as many as it has would be merged with them, key by key."""
    given = [a for a in arguments if a == "--model.stages" or a.startswith("--model.stages=")]
    if not given:
        return list(arguments)
    first = arguments.index(given[0])
    return [*arguments[:first], "--model.stages=null", *arguments[first:]]
