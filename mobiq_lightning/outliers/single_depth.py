"""Derives recipes that calibrate a model for one depth alone from a recipe that calibrates it for all depths."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from mobiq_lightning.errors import RecipeError

SHARED = "shared"
_FEW_WINDOWS = 16
"""Most evaluation windows that a run for one depth is compared on when it ends; the study itself reads all of them."""
_LEFT_OUT = ("LatencyCheck", "OutlierMigration")


def derive_recipes(recipe: dict[str, Any], bits: tuple[int, ...], root: Path) -> dict[str, dict[str, Any]]:
    """Derives one recipe per precision, and a copy of the given one, each with a run folder of its own in `root`.

    Args:
        recipe: The full recipe, with all keys.
        bits: The precisions, as depths in bits.
        root: The folder of the study.

    Returns:
        By name of the run folder, such as ``calibrated-at-3`` or ``calibrated-at-all``, the recipe.

    Raises:
        RecipeError: If the recipe's objective cannot be told to look at one depth.
    """
    found = {f"calibrated-at-{b}": for_one_depth(recipe, b) for b in bits}
    found["calibrated-at-all"] = copy.deepcopy(recipe)
    for name, one in found.items():
        one["model"]["shared_work"] = str(root / SHARED)
        # The journals of a run only: a W&B logger is for the study, and six runs in one process would share its run.
        one["trainer"] |= {"default_root_dir": str(root / name), "logger": None}
    return found


def for_one_depth(recipe: dict[str, Any], bits: int) -> dict[str, Any]:
    """Changes a copy of a recipe such that slices are trained at one depth alone, for all epochs.

    The router is replaced by a static one, since a single depth leaves nothing to route.

    Args:
        recipe: The full recipe, with all keys.
        bits: The depth in bits.

    Raises:
        RecipeError: If the recipe's objective has no `depth_weights`, so it cannot be told to look at one depth.
    """
    one = copy.deepcopy(recipe)
    model, objective = one["model"], one["model"]["objective"]
    if "depth_weights" not in objective.get("init_args", {}):
        raise RecipeError(
            f"outliers: model.objective: {objective['class_path'].rpartition('.')[2]} has no depth_weights, by which a model "
            "is calibrated for one depth alone; use BlockReconstruction"
        )
    objective["init_args"]["depth_weights"] = {bits: 1.0}
    model |= {
        "stages": [{"share": 1.0, "train": ["ranges", "transforms"]}],
        "eval_bits": [float(bits)],
        "random_seeds": [0],
    }
    model["router"] = {"class_path": "mobiq_lightning.strategies.StaticRouter"}
    one["data"]["eval_max_windows"] = min(_FEW_WINDOWS, one["data"]["eval_max_windows"] or _FEW_WINDOWS)
    callbacks = one["trainer"].get("callbacks") or []
    given = callbacks if isinstance(callbacks, list) else [callbacks]
    kept = [c for c in given if c["class_path"].rpartition(".")[2] not in _LEFT_OUT]
    no_timing = {"class_path": "mobiq_lightning.callbacks.LatencyCheck", "init_args": {"seconds": 0.0}}
    one["trainer"]["callbacks"] = [*kept, no_timing]
    return one
