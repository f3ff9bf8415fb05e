"""Parts of the installation that not every command needs, each with its packages, and what to say if one is missing."""

from __future__ import annotations

import importlib.util

from mobiq_lightning.errors import MissingExtraError

EXTRAS: dict[str, tuple[str, ...]] = {
    "report": ("matplotlib", "jinja2"),
    "calibrate": (
        "lightning",
        "jsonargparse",
        "datasets",
        "torchmetrics",
        "tokenizers",
        "platformdirs",
        "filelock",
        "tqdm",
        "matplotlib",
        "jinja2",
    ),
    "evaluate": ("lm_eval",),
    "gguf": ("gguf",),
    "wandb": ("wandb",),
}
"""Extras of pyproject.toml, each with the modules that are imported where it is needed."""


def require(extra: str, what: str) -> None:
    """Checks, without importing them, that the packages of an extra are installed.

    Args:
        extra: A key of `EXTRAS`.
        what: The command or class that needs them; the message begins with it.

    Raises:
        MissingExtraError: Naming the packages that are missing, and what to install.
    """
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f'{what} needs {", ".join(missing)}, not installed here: pip install "mobiq-lightning[{extra}]"'
        )
