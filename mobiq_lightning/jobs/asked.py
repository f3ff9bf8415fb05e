"""The values that a command line asks for, read from its recipes and overrides without any class of theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mobiq_lightning.errors import RecipeError
from mobiq_lightning.jobs.reading import parse_value, read_recipe

_DEFAULT_EPOCHS = 6
"""`epochs_per_block` of `ElasticCalibration`, which imports torch. Recipes in run folders write it out; it is said of no such."""


def asked_values(arguments: Sequence[str]) -> dict[str, Any]:
    """Values by dotted key; of several the last one counts. What cannot be read is left out.

    A strategy that is named without arguments stands under its own key and under ``KEY.class_path``.

    Args:
        arguments: What follows a command, the recipe as ``--config``.

    Raises:
        RecipeError: If there is no such recipe, or it is none.
    """
    found: dict[str, Any] = {}
    pending = list(arguments)
    while pending:
        name, equals, value = pending.pop(0).partition("=")
        if not name.startswith("-") or name == "--overwrite" or not (equals or pending):
            continue
        value = value if equals else pending.pop(0)
        if name in ("--config", "-c"):
            found |= dict(_flat(read_recipe(value), ""))
            continue
        key = name.removeprefix("--").rstrip("+")
        try:
            given = parse_value(value, name)
        except RecipeError:  # said where arguments are checked
            continue
        if isinstance(given, dict) or key.endswith(".class_path") or f"{key}.class_path" in found:
            head = key.removesuffix(".class_path")
            found = {k: v for k, v in found.items() if k != head and not k.startswith(f"{head}.")}
        found |= dict(_flat(given, key))
        if f"{key}.class_path" not in found and isinstance(given, str):
            found[f"{key}.class_path"] = given
    return found


def values_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a recipe by dotted key."""
    return dict(_flat(recipe, ""))


def without_effect(asked: Mapping[str, Any]) -> list[str]:
    """A line for each value that changes nothing, because another one that is given takes its place.

    Args:
        asked: Values by dotted key.
    """
    epochs, stages = asked.get("model.epochs_per_block"), asked.get("model.stages")
    if epochs in (None, _DEFAULT_EPOCHS) or not isinstance(stages, list) or not stages:
        return []
    if not all(isinstance(stage, Mapping) and stage.get("share") is None for stage in stages):
        return []
    return [
        f"model.epochs_per_block ({epochs}) is without effect: no stage of model.stages is a share of it, all say their own "
        "epochs"
    ]


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if key:
        yield key, value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))


def first_words(command: str, asked: Mapping[str, Any]) -> str:
    """What is said before anything heavy is imported: what is begun, with what, and where.

    Args:
        command: The command.
        asked: Values by dotted key.
    """
    folder, model = asked.get("trainer.default_root_dir") or "runs/elastic", asked.get("model.pretrained")
    key = "data.eval_source" if command == "validate" else "data.source"
    text = asked.get(key) or "builtin"
    written = asked.get("data.n_generated")
    text = f"{text} and {written} windows that the model writes" if written and command != "validate" else text
    return f"{command} in {folder}: model {model}, text {text}. Loading PyTorch and Lightning ..."
