"""How the keys of a recipe are parsed: defaults of the trainer, and errors in a few lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from mobiq_lightning.console import MODULE
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


_LONGEST = 300
"""Characters of the parser's own words that are shown."""


class RecipeParser(LightningArgumentParser):
    """Says what is wrong in a few lines instead of a page of usage, and takes no abbreviated keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Turns whatever the parser finds into a `RecipeError`."""
        if "are required" in message:
            message += ". Give a recipe, as in --config recipes/tiny.yaml"
        raise RecipeError(in_a_line(message)) from ex


def in_a_line(message: str) -> str:
    """What the parser says of a key over several lines, as one line that begins with the key."""
    key = "".join(f"{name}: " for name in re.findall(r'Parser key "([^"]+)":', message)[:1])
    if missing := re.search(r"No module named '([\w.]+)'", message):
        return (
            f"{key}no module {missing[1]!r} is on the Python path. Run `{MODULE}` from the folder of its file, or put that "
            "folder into PYTHONPATH"
        )
    parts = [part.strip(" -") for part in re.sub(r'Parser key "[^"]+":', "", message).splitlines()]
    text = " ".join(part if part.endswith((":", ".", ",")) else f"{part};" for part in parts if part).rstrip("; ")
    return key + (text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


def with_whole_stages(arguments: Sequence[str]) -> list[str]:
    """Arguments under which stages replace those that were given before; as many of them would be merged, key by key."""
    found: list[str] = []
    for argument in arguments:
        if argument == "--model.stages" or argument.startswith("--model.stages="):
            found.append("--model.stages=null")
        found.append(argument)
    return found
