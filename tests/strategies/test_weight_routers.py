"""Routers that look at the weights: what they know fits the slices that are stored, and what they are is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mobiq_lightning import load
from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.callbacks import ThresholdTuning
from mobiq_lightning.cli import main
from mobiq_lightning.nn import ElasticLinear
from mobiq_lightning.strategies import ErrorSketchRouter
from tests.checkpoints import tensors_of
from tests.conftest import UNTIMED, small_recipe
from tests.processes import forked_cells

ROOT = Path(__file__).parents[2]
ROUTER = "--model.router={class_path: ErrorSketchRouter, init_args: {n_projections: 4, seed: 3}}"

BUDGET = ["--model.budget=ListedBudget", "--model.budget.points=[[0, 6], [0.5, 4], [1, 3]]"]


class WatchingTuning(ThresholdTuning):
    """Keeps what the routers know when thresholds are tuned."""

    seen: list[torch.Tensor] = []  # noqa: RUF012 - the command line makes the instance

    def tune(self, module: ElasticCalibration, input_ids: torch.Tensor) -> None:
        WatchingTuning.seen[:] = [routed.router.factors.clone() for routed in module.sliced.all_inputs()]


def sketch_of_stored(model: Any, source: dict[str, torch.Tensor], position: int, name: str) -> torch.Tensor:
    """The factors that a sketch has of the stored slices of the linears that read input `name`."""
    routed = model.get_submodule(f"{name}.input")
    readers = [(n, m) for n, m in model.named_modules() if isinstance(m, ElasticLinear) and m.routed is routed]
    prefixes = torch.stack([torch.cat([m.weight_at(depth) for _, m in readers]) for depth in routed.depths])
    sketch = ErrorSketchRouter(readers[0][1].in_features, len(routed.depths), n_projections=4, seed=3)
    sketch.place(position, len(WatchingTuning.seen))
    sketch.observe_weights(torch.cat([source[f"{n}.weight"] for n, _ in readers]), prefixes, routed.slice_bits)
    return sketch.factors


def test_sketches_fit_the_stored_slices_before_thresholds_are_tuned_and_after_loading(
    recipe_arguments: list[str], tmp_path: Path
) -> None:
    # A callback of the recipe runs before those that every run has, and must still see final weights.
    watching = f"{{class_path: {__name__}.WatchingTuning}}"
    assert main(["fit", *recipe_arguments, ROUTER, f"--trainer.callbacks=[{watching}, {UNTIMED}]", *BUDGET]) == 0
    model = load(tmp_path / "run")
    folder = Path(next(a for a in recipe_arguments if a.startswith("--model.pretrained=")).partition("=")[2])
    source = tensors_of(folder)
    names = [n.removesuffix(".input") for n, _ in model.named_modules() if n.endswith(".input")]
    assert len(names) == len(WatchingTuning.seen) == 8
    for position, name in enumerate(names):
        stored = model.get_submodule(f"{name}.input").router.factors
        assert torch.equal(stored, WatchingTuning.seen[position])
        torch.testing.assert_close(stored, sketch_of_stored(model, source, position, name), atol=1e-5, rtol=1e-5)


def test_an_oracle_is_called_not_deployable_wherever_it_is_shown_and_its_bits_are_counted(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        a.removeprefix("--").split("=", 1) for a in small_recipe(make_model(), text_file, tmp_path, True) if "=" in a
    ]
    grid = {
        "name": "bound",
        "recipe": str(ROOT / "recipes" / "tiny-ranges.yaml"),
        "folder": str(tmp_path / "out"),
        "seeds": [0],
        "bits": [2.5],
        "changes": {
            k: yaml.safe_load(v) for k, v in given if k not in ("trainer.default_root_dir", "model.random_seeds")
        },
        "strategies": {"exact": {"model.router": "OracleRouter"}},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    with forked_cells():
        assert main(["compare", "--config", str(tmp_path / "grid.yaml")]) == 0
    assert "exact cannot be deployed: its routers store" in " ".join(capsys.readouterr().out.split())
    run = next((tmp_path / "out" / "cells").iterdir())
    results = json.loads((run / "results.json").read_text())
    assert results["router"] == {"class": "OracleRouter", "deployable": False}
    row = next(r for r in results["rows"] if r["allocation"] == "router" and r["target_bits"] == 2.5)
    assert row["all_in_bits"] > row["used_bits"] + 32  # more than the weights in float32
    assert main(["inspect", str(run)]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "8 x OracleRouter, not deployable: an upper bound" in output
    assert "router, not deployable" in output
    assert "| router, not deployable | 2.5 |" in (run / "elastic" / "README.md").read_text()
