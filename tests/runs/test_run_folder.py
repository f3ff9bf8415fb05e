"""A run folder: what is its own, and what may change when a run goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mobiq_lightning.callbacks import Guards, LatencyCheck
from mobiq_lightning.comparison.check import without_speed
from mobiq_lightning.comparison.grid import Cell
from mobiq_lightning.errors import RunFolderError
from mobiq_lightning.runs import RUN_FILES, RunFolder, differing_keys, loaded_class, without_places
from tests.conftest import Run


class StricterGuards(Guards):
    """A callback that is a guard by its base class alone."""


class Timing(LatencyCheck):
    """A callback that measures speed by its base class alone."""


def recipe(*callbacks: Any) -> dict[str, Any]:
    return {"model": {"pretrained": "m"}, "trainer": {"callbacks": [*callbacks]}}


def named(path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


def finish_an_epoch(folder: RunFolder) -> None:
    (folder.path / "checkpoints").mkdir(exist_ok=True)
    (folder.path / "checkpoints" / "epoch-000000.ckpt").write_bytes(b"learned")


GUARDS = ["mobiq_lightning.callbacks.Guards", "mobiq_lightning.callbacks.guards.Guards", f"{__name__}.StricterGuards"]


@pytest.mark.parametrize("path", GUARDS)
def test_guards_and_what_derives_from_them_may_change_when_a_run_goes_on(tmp_path: Path, path: str) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.claim(recipe(named(path, worse_block="stop")), overwrite=False) is False
    assert folder.claim(recipe(named(path, worse_block="record")), overwrite=False) is True
    assert "record" in (tmp_path / "run" / "config.yaml").read_text()
    assert folder.claim(recipe(), overwrite=False) is True
    finish_an_epoch(folder)
    with pytest.raises(RunFolderError, match=r"trainer\.callbacks"):
        folder.claim(recipe(named("mobiq_lightning.callbacks.LayerGains", windows=4)), overwrite=False)


def test_no_class_of_a_stored_recipe_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_callbacks.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = RunFolder(tmp_path / "run")
    folder.claim(recipe(named("foreign_callbacks.Guards")), overwrite=False)
    finish_an_epoch(folder)
    with pytest.raises(RunFolderError, match=r"foreign_callbacks\.Guards"):
        folder.claim(recipe(), overwrite=False)
    assert "foreign_callbacks" not in sys.modules


def test_a_class_is_found_by_its_path_or_beside_our_own_by_its_name_alone() -> None:
    assert loaded_class("mobiq_lightning.callbacks.guards.Guards") is Guards
    assert loaded_class({"class_path": "Guards"}, "mobiq_lightning.callbacks") is Guards
    assert [
        loaded_class(path) for path in ("Guards", "nowhere.Guards", "mobiq_lightning.callbacks.guards.sentence")
    ] == [None] * 3


def test_cells_of_a_comparison_measure_no_speed_whatever_the_callback_is_called() -> None:
    paths = ["LatencyCheck", "mobiq_lightning.callbacks.latency_check.LatencyCheck", f"{__name__}.Timing"]
    given = recipe(named(GUARDS[0]), *(named(path, seconds=9) for path in paths))
    cell = without_speed(Cell("a", 0, given, {}, Path("a")))
    quiet = named("mobiq_lightning.callbacks.LatencyCheck", seconds=0)
    assert cell.recipe == recipe(named(GUARDS[0]), quiet)
    assert len(given["trainer"]["callbacks"]) == 4  # the recipe that was given is left as it is


def test_all_that_a_run_leaves_has_its_name_among_the_files_of_runs(finished: Run) -> None:
    assert {path.name for path in finished[0].iterdir()} <= set(RUN_FILES)


def test_a_key_that_earlier_versions_did_not_have_differs_only_where_it_changes_something() -> None:
    def recipe(mixed: dict[str, float], warmup: dict[str, float], **model: str) -> dict[str, Any]:
        stages = [{"train": ["codes"], "depth": 3, **mixed}]
        return {"model": {"stages": stages, "rates": {"codes": 1e-3, **warmup}, "eval_bits": [2], **model}}

    stored, same = recipe({}, {}), recipe({"mixed": 0.0}, {"warmup": 0.0}, block_inputs="calibrated")
    other = recipe({"mixed": 0.35}, {"warmup": 0.25}, block_inputs="full")
    assert list(differing_keys(stored, same)) == list(differing_keys(same, stored)) == []
    differing = [line.split(":")[0] for line in differing_keys(stored, other)]
    assert differing == ["model.stages", "model.rates.warmup", "model.block_inputs"]


def test_a_run_names_files_so_that_it_can_be_read_from_every_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "t.txt").write_text("text")
    (tmp_path / "wikitext2").write_text("a file that is named like a text of the hub")
    monkeypatch.chdir(tmp_path)
    given = {**recipe(), "data": {"source": "t.txt", "eval_source": "wikitext2", "seq_len": 8}}
    folder = RunFolder(tmp_path / "run")
    folder.claim(given, overwrite=False)
    stored = yaml.safe_load(folder.recipe.read_text())
    assert stored["model"] == {"pretrained": str(tmp_path / "m")}
    assert stored["data"] == {"source": str(tmp_path / "t.txt"), "eval_source": "wikitext2", "seq_len": 8}
    assert given["model"] == {"pretrained": "m"}
    finish_an_epoch(folder)
    assert folder.claim(given, overwrite=False) is True
    monkeypatch.chdir("/")
    assert folder.claim(stored, overwrite=False) is True
    with pytest.raises(RunFolderError, match=r"model\.pretrained: .*m' -> 'm'"):
        folder.claim(given, overwrite=False)
    stored["trainer"]["default_root_dir"] = str(tmp_path / "run")
    shown = without_places(stored)
    assert (shown["model"], shown["data"]["source"]) == ({"pretrained": "m"}, "t.txt")
    assert shown["trainer"]["default_root_dir"] == "run"
