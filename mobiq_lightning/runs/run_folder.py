"""The run folder: whose it is, how far it is, and what a command may do in it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mobiq_lightning.errors import RunFolderError
from mobiq_lightning.files import sha256, write_json, write_text
from mobiq_lightning.runs.class_path import loaded_class
from mobiq_lightning.runs.file_names import (
    CHECKPOINTS,
    CONFIG,
    ELASTIC,
    IDENTITY,
    RESULTS,
    RETRIES,
    RUN_CONFIG,
    RUN_FILES,
)
from mobiq_lightning.runs.results import Results, read_results

_IRRELEVANT = (
    "overwrite",
    "config",
    "model.shared_work",
    "trainer.logger",
    "trainer.default_root_dir",
    "trainer.log_every_n_steps",
)
"""Keys that may differ between an interrupted run and the one that goes on with it."""
_WHOLE_MODEL = "model"


class RunFolder:
    """A folder that holds one run.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def recipe(self) -> Path:
        """The recipe that the run was made from, with every default written out."""
        return self.path / RUN_CONFIG

    @property
    def checkpoint(self) -> Path:
        """The folder of the elastic checkpoint, which `mobiq_lightning.load` takes."""
        return self.path / ELASTIC

    def results(self) -> Results:
        """What the run has measured; perplexities by allocation and bits are in `measured.rows`.

        Raises:
            RunFolderError: If the run is not finished.
            ResultsError: If results.json is damaged or from another version.
        """
        path = self.path / RESULTS
        if not path.is_file():
            raise RunFolderError(f"{self.path} holds no {RESULTS}: the run is not finished; `fit` goes on with it")
        return read_results(path)

    @property
    def finished(self) -> bool:
        """Whether the run in it has both a checkpoint and results."""
        return (self.path / RESULTS).is_file() and (self.path / ELASTIC / CONFIG).is_file()

    def claim(self, recipe: dict[str, Any], overwrite: bool) -> bool:
        """Makes the folder this recipe's.

        Args:
            recipe: The full recipe.
            overwrite: Remove another run.

        Returns:
            Whether the folder already held a run of this recipe.

        Raises:
            RunFolderError: If it holds another run, or files that are no run.
        """
        if overwrite:
            self.clear()
        config = self.path / RUN_CONFIG
        if config.is_file():
            stored = yaml.safe_load(config.read_text(encoding="utf-8"))
            differences = list(differing_keys(_fixed_part(stored)[0], _fixed_part(recipe)[0]))
            if differences:
                raise RunFolderError(
                    f"{self.path} holds a run with another recipe:\n  " + "\n  ".join(differences) + "\n"
                    "Give another trainer.default_root_dir, or --overwrite to remove that run. To compare a finished run "
                    "at other bits or on other text, use `validate`"
                )
            if _fixed_part(stored)[1] != _fixed_part(recipe)[1]:
                write_text(config, yaml.safe_dump(recipe, sort_keys=False))
            return True
        foreign = [name for name in (ELASTIC, RESULTS, CHECKPOINTS) if (self.path / name).exists()]
        if foreign:
            raise RunFolderError(
                f"{self.path} holds {', '.join(foreign)} but no {RUN_CONFIG}, so what made them is unknown. Give another "
                "trainer.default_root_dir, or --overwrite to remove them"
            )
        write_text(config, yaml.safe_dump(recipe, sort_keys=False))
        return False

    def clear(self) -> None:
        """Removes what a run writes, and nothing else."""
        for name in RUN_FILES:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def newest_checkpoint(self) -> tuple[Path | None, list[Path]]:
        """The newest training checkpoint that is whole.

        Returns:
            Its path, or None; and the newer ones that are damaged.
        """
        damaged: list[Path] = []
        for path in sorted((self.path / CHECKPOINTS).glob("*.ckpt"), key=_epoch, reverse=True):
            sidecar = path.with_suffix(".sha256")
            if sidecar.is_file() and sidecar.read_text(encoding="utf-8").strip() == sha256(path):
                return path, damaged
            damaged.append(path)
        return None, damaged

    def drop_checkpoints_after(self, epochs_done: int) -> None:
        """Removes the training checkpoints written after `epochs_done` epochs."""
        for path in (self.path / CHECKPOINTS).glob("*.ckpt"):
            if _epoch(path) >= epochs_done:
                path.unlink()
                path.with_suffix(".sha256").unlink(missing_ok=True)

    def retries(self) -> dict[int | None, int]:
        """How often each block, or the stages of the whole model (None), were started anew after NaN or infinity."""
        path = self.path / RETRIES
        stored = json.loads(path.read_text()) if path.is_file() else {}
        return {None if k == _WHOLE_MODEL else int(k): v for k, v in stored.items()}

    def note_retry(self, block: int | None) -> int:
        """Counts a retry of a block; returns how many it has had."""
        retries = self.retries()
        retries[block] = retries.get(block, 0) + 1
        write_json(self.path / RETRIES, {_WHOLE_MODEL if k is None else k: v for k, v in retries.items()})
        return retries[block]


def check_identity(folder: Path, identity: dict[str, str]) -> None:
    """Compares model and data with those that the run in `folder` was started with.

    Raises:
        RunFolderError: Naming what has changed.
    """
    path = folder / IDENTITY
    if not path.is_file():
        write_json(path, identity)
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    changed = [f"{k}: {stored.get(k)} then, {v} now" for k, v in identity.items() if stored.get(k) != v]
    if changed:
        raise RunFolderError(
            f"{folder} holds a run of this recipe on something else:\n  " + "\n  ".join(changed) + "\n"
            "Files behind model.pretrained or data.source have changed. Give another trainer.default_root_dir, or "
            "--overwrite"
        )


def differing_keys(stored: Any, given: Any, prefix: str = "") -> Iterator[str]:
    """Lines ``key: stored value -> given value`` for every key that matters and differs."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in [*stored, *(k for k in given if k not in stored)]:
            yield from differing_keys(stored.get(key), given.get(key), f"{prefix}{key}.")
    elif stored != given and not any(prefix.startswith(f"{key}.") for key in _IRRELEVANT):
        yield f"{prefix.rstrip('.')}: {stored!r} -> {given!r}"


def _fixed_part(recipe: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """A recipe without the callbacks that a run may change when it goes on, and these callbacks.

    A callback says so itself, with a class attribute ``may_change_on_resume`` that is true, as `Guards` does: a run that a
    guard has stopped goes on with another action. What was calibrated until then passed the guard, so it is what it would
    have been with the other action.
    """
    trainer = recipe.get("trainer") or {}
    callbacks = trainer.get("callbacks") or []
    free = [c for c in callbacks if getattr(loaded_class(c), "may_change_on_resume", False)]
    fixed = [c for c in callbacks if c not in free]
    return {**recipe, "trainer": {**trainer, "callbacks": fixed or None}}, free


def _epoch(path: Path) -> int:
    found = re.search(r"epoch-(\d+)", path.stem)
    return int(found.group(1)) if found else -1
