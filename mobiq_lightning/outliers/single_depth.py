"""Recipes that calibrate a model for one depth alone, made of a recipe for all of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from mobiq_lightning.errors import RecipeError

SHARED = "shared"
_FEW_WINDOWS = 16
"""On which a run for one depth is compared when it ends: the study reads it on all of them."""
_LEFT_OUT = ("LatencyCheck", "OutlierMigration")


def derive_recipes(recipe: dict[str, Any], bits: tuple[int, ...], root: Path) -> dict[str, dict[str, Any]]:
    """One recipe per precision, and the given one, each with a folder of its own in `root`.

    Args:
        recipe: In full, with all keys.
        bits: The precisions.
        root: The folder of the study.

    Returns:
        By the name of the sub-folder.

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
    """The recipe with slices trained at one depth for all of the epochs; routers, which that depth never asks, stay out."""
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
