"""``recipes ls`` and ``recipes cp``, and recipes by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mobiq_lightning.cli import main
from mobiq_lightning.comparison.grid import read_grid
from mobiq_lightning.console import program
from mobiq_lightning.errors import RecipeError
from mobiq_lightning.jobs import GRIDS, recipe_path, shipped_recipe, shipped_recipes

RECIPES = Path(__file__).parents[2] / "recipes"


def test_all_recipes_are_listed_with_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "ls"]) == 0
    printed = capsys.readouterr().out
    shipped = {path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")}
    assert {*shipped_recipes()} == shipped
    first_words = {line.split(" ")[0] for line in printed.splitlines() if line and not line.startswith(" ")}
    assert shipped <= first_words
    assert "The whole way, offline: a small LLaMA" in printed


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_copy_says_what_the_recipe_says_and_how_it_is_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "cp", name]) == 0
    (copied,) = tmp_path.iterdir()
    original = shipped_recipes()[name]
    assert copied.name == original.name
    assert yaml.safe_load(copied.read_text()) == yaml.safe_load(original.read_text())
    command = copied.read_text().splitlines()[0].removeprefix("# ")
    assert f"{copied.name}" in command
    assert "recipes/" not in command
    assert command.replace("python -m mobiq_lightning", program()) in capsys.readouterr().out
    if name.startswith(GRIDS):  # the recipe that it starts from is found from any folder
        assert read_grid(copied.name).cells()[0].recipe["model"]["pretrained"] == "builtin"


def test_a_copy_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text("mine")
    assert main(["recipes", "cp", "tiny", str(tmp_path)]) == 2
    assert f"{tmp_path / 'tiny.yaml'} is there already" in capsys.readouterr().err
    assert (tmp_path / "tiny.yaml").read_text() == "mine"
    assert main(["recipes", "cp", "tiny", str(tmp_path / "other.yaml")]) == 0
    assert f"fit --config {tmp_path / 'other.yaml'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cp", "tinny"], "no recipe 'tinny' is shipped. Did you mean 'tiny'"),
        (["cp", "budgets"], "compare/budgets and sweeps/budgets are shipped"),
        (["cp"], "give the name of a recipe"),
        (["cp", "tiny", "nowhere/tiny.yaml"], "there is no folder nowhere"),
        (["ls", "tiny"], "takes no name"),
        (["copy", "tiny"], "no action 'copy'"),
        ([], "missing: ls | cp"),
    ],
)
def test_what_cannot_be_copied_is_answered(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_name_stands_for_a_shipped_recipe_unless_there_is_such_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_path("tiny") == str(shipped_recipe("tiny"))
    assert recipe_path("compare/budgets") == str(RECIPES / "compare" / "budgets.yaml")
    assert recipe_path("budgets", GRIDS) == str(RECIPES / "compare" / "budgets.yaml")
    assert recipe_path("budgets") == "budgets"
    assert recipe_path("tiny.yaml") == "tiny.yaml"
    (tmp_path / "tiny").write_text("model: {}")
    assert recipe_path("tiny") == "tiny"
    with pytest.raises(RecipeError, match=r"no recipe 'nothing-like-it' is shipped. There are llama2-7b"):
        shipped_recipe("nothing-like-it")
