"""Jobs as functions, as a notebook calls them."""

from __future__ import annotations

import importlib
import logging
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Callback

import mobiq_lightning
from mobiq_lightning.errors import RecipeError, RunFolderError
from mobiq_lightning.jobs import build, outliers
from mobiq_lightning.jobs.arguments import command_line, with_recipe
from mobiq_lightning.runs import RunFolder
from tests.conftest import Run


class TestCommandLine:
    def test_dotted_and_nested_keys_say_the_same(self) -> None:
        dotted = command_line("r.yaml", {"model.rates.routers": 0.1, "data.source": "a.txt"})
        assert dotted == command_line(
            "r.yaml", {"model": {"rates": {"routers": 0.1}}, "data": {"source": Path("a.txt")}}
        )
        assert dotted == ["--config", "r.yaml", "--model.rates.routers=0.1", "--data.source=a.txt"]

    def test_a_mapping_that_names_a_class_is_a_value_and_others_are_keys(self) -> None:
        slices = {"class_path": "ResidualSlices", "init_args": {"slice_bits": (2, 2)}}
        whole, argument = command_line({}, {"model": {"slices": slices}})[2:], {"init_args": {"group_size": 32}}
        key, _, text = whole[0].partition("=")
        assert key == "--model.slices"
        assert yaml.safe_load(text) == {"class_path": "ResidualSlices", "init_args": {"slice_bits": [2, 2]}}
        assert command_line({}, {"model.slices": argument})[2:] == ["--model.slices.init_args.group_size=32"]

    @pytest.mark.parametrize(
        "value", [None, True, 1e-05, 3, [2, 2.5], [{"depth": 2, "other_depths": {8: 1.0}}], "text"]
    )
    def test_values_stay_what_they_are(self, value: Any) -> None:
        (argument,) = command_line({}, {"model.x": value})[2:]
        found = yaml.safe_load(argument.partition("=")[2])
        assert found == value
        assert type(found) is type(value)

    def test_what_no_recipe_can_say_is_refused(self) -> None:
        with pytest.raises(RecipeError, match=r"model.router: .* is nothing that a recipe can say"):
            command_line("r.yaml", {"model": {"router": object()}})

    def test_a_recipe_is_given_first_by_name_or_as_a_run(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("model: {}")
        assert with_recipe(["a.yaml", "--x", "1"]) == ["--config", "a.yaml", "--x", "1"]
        assert with_recipe(["--x=1", "-c", "a.yaml"]) == ["--x=1", "--config", "a.yaml"]
        _, tiny = with_recipe(["tiny"])
        assert tiny.endswith("/recipes/tiny.yaml")
        assert with_recipe(["--config={model: {}}"]) == ["--config", "{model: {}}"] == command_line({"model": {}}, {})
        of_run = ["--config", str(tmp_path / "config.yaml"), f"--trainer.default_root_dir={tmp_path}"]
        assert with_recipe([str(tmp_path)]) == of_run == command_line(RunFolder(tmp_path), {})

    def test_the_recipe_in_a_run_folder_stands_for_that_folder_and_a_copy_alone_for_itself(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, recipe = tmp_path / "moved", {"trainer": {"default_root_dir": "runs/before"}}
        RunFolder(run).claim(recipe, overwrite=False)
        config = str(run / "config.yaml")
        assert with_recipe([config]) == ["--config", config]
        (run / "results.json").write_text("{}")
        of_run = ["--config", config, f"--trainer.default_root_dir={run}"]
        assert with_recipe([config]) == with_recipe(["-c", config]) == with_recipe([str(run)]) == of_run
        monkeypatch.chdir(run)
        assert with_recipe(["config.yaml"]) == ["--config", "config.yaml", "--trainer.default_root_dir=."]
        shutil.copy(config, run / "mine.yaml")
        assert with_recipe(["mine.yaml"]) == ["--config", "mine.yaml"]
        (run / "config.yaml").write_text("model: {}")  # by somebody's hand
        assert with_recipe(["config.yaml"]) == ["--config", "config.yaml"]


def test_building_claims_no_folder_and_changes_nothing_of_the_process(tmp_path: Path) -> None:
    importlib.import_module(
        "mobiq_lightning.jobs.cli"
    )  # what Lightning and torch set up when they are imported is theirs
    before = [*sys.argv], [*warnings.filters], logging.getLogger("lightning.pytorch").level
    folder = tmp_path / "run"
    built = build("tiny", trainer={"default_root_dir": folder, "accelerator": "cpu"}, model={"eval_bits": [2, 3]})
    assert built.model.eval_bits == [2, 3]
    assert built.trainer.default_root_dir == str(folder)
    assert not folder.exists()
    assert before == ([*sys.argv], [*warnings.filters], logging.getLogger("lightning.pytorch").level)


def test_what_is_wrong_is_raised(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.routr: no such key. Did you mean 'model.router'"):
        mobiq_lightning.fit("tiny", model={"routr": "MLPRouter"})
    with pytest.raises(RecipeError, match=r"the recipe: modle: no such key"):
        mobiq_lightning.fit({"modle": {}})
    with pytest.raises(RecipeError, match=r"tini: no such file, run folder or shipped recipe. Did you mean 'tiny'"):
        mobiq_lightning.fit("tini")
    with pytest.raises(RecipeError, match=r"seeds: \[\]|seeds: none is given"):
        mobiq_lightning.compare("budgets", seeds=[], folder=tmp_path)
    with pytest.raises(RunFolderError, match=r"holds no results\.json"):
        RunFolder(tmp_path).results()


@pytest.mark.parametrize("recipe", [None, 3, b"tiny", ["tiny"], object])
@pytest.mark.parametrize("job", ["fit", "validate", "build", "outliers"])
def test_what_is_no_recipe_is_refused(job: str, recipe: Any) -> None:
    with pytest.raises(
        RecipeError, match="a recipe is a path, the name of a shipped one, a run folder or a mapping, not"
    ):
        {"fit": mobiq_lightning.fit, "validate": mobiq_lightning.validate, "build": build, "outliers": outliers}[job](
            recipe
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": {"eval_bits": object}}, "model.eval_bits: .* is nothing that a recipe can say"),
        ({"model.eval_bits": 10**5000}, "model.eval_bits: a value of type int that is too large to show is nothing"),
        ({"model.eval_bits": [float("nan")]}, "nan is not a number|nan is no number|is out of range"),
        ({"model.rates.ranges": float("inf")}, "model.rates.ranges: inf is out of range"),
        ({"seed_everything": -1}, "seed_everything: -1 is out of range"),
        ({"model": 3}, "model: 3; a mapping of keys to values is expected"),
        ({3: 3}, "3: no such key"),
    ],
)
def test_overrides_that_no_recipe_can_say_are_refused(overrides: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build("tiny", **{str(key): value for key, value in overrides.items()})


def test_a_mapping_that_holds_itself_is_refused() -> None:
    recipe: dict[str, Any] = {}
    recipe["model"] = recipe
    with pytest.raises(RecipeError, match="is nothing that a recipe can say"):
        build(recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": "24"}, "bits '24'; a list of whole numbers from 1 to 8"),
        ({"bits": 3}, "bits 3; a list"),
        ({"bits": [2.5]}, r"bits \[2.5\]; a list"),
        ({"bits": [99]}, r"bits \[99\]; a list"),
        ({"share": float("nan")}, r"share \(nan\) must be a number above 0 and below 1"),
        ({"share": "0.1"}, r"share \('0.1'\) must be a number"),
    ],
)
def test_settings_of_the_study_of_outliers_are_checked_at_once(settings: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        outliers("outliers", **settings)


def router_bits(run: RunFolder) -> set[float]:
    measured = run.results().measured
    assert measured is not None
    return {row.target_bits for row in measured.rows if row.allocation == "router"}


class Interrupt(Callback):
    """A user who presses Ctrl-C when training starts."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        raise KeyboardInterrupt


def test_a_run_is_made_continued_and_compared_again_from_python(finished: Run, tmp_path: Path) -> None:
    stored = RunFolder(finished[0])
    recipe = yaml.safe_load(stored.recipe.read_text())
    folder = tmp_path / "run"
    quick = {"epochs_per_block": 1, "stages": [{"share": 1.0, "train": ["ranges", "routers"]}]}
    callbacks = [{"class_path": f"{__name__}.Interrupt"}]
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        mobiq_lightning.fit(recipe, model=quick, trainer={"default_root_dir": folder, "callbacks": callbacks})
    assert signal.getsignal(signal.SIGINT) is handler
    made = mobiq_lightning.fit(recipe, overwrite=True, model=quick, trainer={"default_root_dir": folder})
    assert made.path == folder
    assert made.finished
    assert router_bits(made) == {2, 2.5, 8}
    assert mobiq_lightning.verify(made.checkpoint) == []
    written = (made.checkpoint / "config.json").stat().st_mtime_ns
    moved = shutil.move(folder, tmp_path / "moved")
    again = mobiq_lightning.validate(RunFolder(moved), model={"eval_bits": [3]})
    assert again.path == tmp_path / "moved"
    assert router_bits(again) == {2, 2.5, 3, 8}
    assert mobiq_lightning.fit(moved).path == tmp_path / "moved"
    assert (again.checkpoint / "config.json").stat().st_mtime_ns == written


def test_the_study_of_outliers_takes_keys_and_options_as_a_fit_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"model\.roter: no such key"):
        outliers("outliers", model={"roter": 1})
    calls: list[Any] = []
    monkeypatch.setattr("mobiq_lightning.jobs.study.run_outliers", lambda *given: calls.append(given))
    outliers("outliers", bits=(2, 4), share=0.2, overwrite=True, **{"data.n_samples": 8})
    ((arguments, bits, share),) = calls
    assert arguments[0] == "--config"
    assert arguments[1].endswith("outliers.yaml")
    assert arguments[2:] == ["--data.n_samples=8", "--overwrite"]
    assert (bits, share) == ((2, 4), 0.2)


@pytest.mark.parametrize("function", [mobiq_lightning.fit, outliers])
@pytest.mark.parametrize("overwrite", ["no", None, 1])
def test_whether_to_overwrite_is_said_with_true_or_false(function: Any, overwrite: Any) -> None:
    with pytest.raises(RecipeError, match="must be True or False"):
        function("tiny", overwrite=overwrite)
