"""What of two recipes must be the same for a run to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mobiq_lightning.runs.class_path import loaded_class

_IRRELEVANT = (
    "overwrite",
    "config",
    "model.shared_work",
    "trainer.logger",
    "trainer.default_root_dir",
    "trainer.log_every_n_steps",
    "trainer.fast_dev_run",
    "trainer.max_steps",
    "trainer.min_steps",
    "trainer.max_time",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.profiler",
    "trainer.detect_anomaly",
    "trainer.num_sanity_val_steps",
)
"""Keys that may differ between an interrupted run and the one that goes on with it: what they limit or show is not learned."""
_LIMITS = ("lightning.pytorch.callbacks.Timer", "lightning.pytorch.callbacks.EarlyStopping")
"""Callbacks that end a run early and change nothing else of it, as recipes name them; a run may go on without them."""

_SOURCES = {"model": ("pretrained",), "data": ("source", "eval_source")}
"""Keys that may name a local file or folder, by their group."""


_ADDED = {"mixed": 0.0, "warmup": 0.0, "experts": True, "max_saturation": None, "block_inputs": "calibrated"}
"""Keys that recipes of earlier versions lack, each with the value at which all is as it was without it."""


def differing_keys(stored: Any, given: Any, prefix: str = "") -> Iterator[str]:
    """Lines ``key: stored value -> given value`` for every key that matters and differs."""
    if isinstance(stored, dict) and isinstance(given, dict):
        stored, given = _as_before(stored), _as_before(given)
        for key in [*stored, *(k for k in given if k not in stored)]:
            yield from differing_keys(stored.get(key), given.get(key), f"{prefix}{key}.")
    elif _as_before(stored) != _as_before(given) and not any(prefix.startswith(f"{key}.") for key in _IRRELEVANT):
        yield f"{prefix.rstrip('.')}: {stored!r} -> {given!r}"


def _as_before(value: Any) -> Any:
    """A value of a recipe without keys that earlier versions do not have and that change nothing."""
    if isinstance(value, list):
        return [_as_before(item) for item in value]
    if isinstance(value, dict):
        return {k: _as_before(v) for k, v in value.items() if k not in _ADDED or v != _ADDED[k]}
    return value


def differing_keys_of_runs(stored: dict[str, Any], given: dict[str, Any]) -> Iterator[str]:
    """Lines as `differing_keys` gives them, without callbacks that a run may change when it goes on.

    A file is the same whether it is named by its whole path or from the working directory.
    """
    yield from differing_keys(_fixed_part(located(stored)), _fixed_part(located(given)))


def located(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe in which local models and texts are named by whole paths, so that it means the same in every directory.

    Args:
        recipe: A recipe as it was given; it stays as it is.
    """
    return _with_names(recipe, lambda path: str(path.absolute()))


def without_places(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe in which local models, texts and the run folder are named without the folder that they lie in, for others to see.

    Args:
        recipe: A recipe as it was given; it stays as it is.
    """
    found = _with_names(recipe, lambda path: path.absolute().name)
    if isinstance(trainer := found.get("trainer"), dict) and isinstance(trainer.get("default_root_dir"), str):
        found["trainer"] = {**trainer, "default_root_dir": without_place(trainer["default_root_dir"])}
    return found


def without_place(name: str) -> str:
    """The last part of a whole path; any other name, as that of a model of the hub, as it is."""
    return Path(name).name if Path(name).is_absolute() else name


def _with_names(recipe: dict[str, Any], named: Callable[[Path], str]) -> dict[str, Any]:
    found = dict(recipe)
    for group, keys in _SOURCES.items():
        if isinstance(values := recipe.get(group), dict):
            local = {key: path for key in keys if (path := _local(key, values.get(key))) is not None}
            found[group] = {**values, **{key: named(path) for key, path in local.items()}}
    return found


def _local(key: str, name: Any) -> Path | None:
    """The local file, or folder of a model, that a name in a recipe means."""
    if not isinstance(name, str) or name in ("", "builtin"):
        return None
    path = Path(name).expanduser()
    try:
        return path if (path.suffix and path.is_file()) or (key == "pretrained" and path.is_dir()) else None
    except (OSError, ValueError):  # too long a name, or one with a null byte: said where it is read
        return None


def _fixed_part(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the callbacks that a run may change when it goes on.

    A callback says so itself, with a class attribute ``may_change_on_resume`` that is true, as `Guards` does: a run that a
    guard has stopped goes on with another action. What was calibrated until then passed the guard, so it is what it would
    have been with the other action.
    """
    trainer = recipe.get("trainer") or {}
    fixed = [callback for callback in trainer.get("callbacks") or [] if not _may_change(callback)]
    return {**recipe, "trainer": {**trainer, "callbacks": fixed or None}}


def _may_change(callback: Any) -> bool:
    """Whether a run may go on with another such callback, or without it."""
    path = callback.get("class_path") if isinstance(callback, dict) else callback
    return path in _LIMITS or bool(getattr(loaded_class(callback), "may_change_on_resume", False))
