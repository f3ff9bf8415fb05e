"""Grids, and the table at equal used bits."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

import mobiq_lightning
from mobiq_lightning.cli import main
from mobiq_lightning.comparison.check import check_cells
from mobiq_lightning.comparison.folder import ComparisonFolder
from mobiq_lightning.comparison.grid import read_grid
from mobiq_lightning.comparison.table import CellRow, at_bits, lead, long_table, points_of
from mobiq_lightning.comparison.verdicts import all_in_verdicts, verdicts
from mobiq_lightning.errors import MobiqError, RecipeError, RunFolderError
from mobiq_lightning.runs import Allocation, Row

RECIPES = Path(__file__).parents[2] / "recipes"
GRIDS = sorted((RECIPES / "compare").glob("*.yaml"))


def write_grid(folder: Path, /, **changes: Any) -> Path:
    """A small valid grid with some keys changed; None leaves one out."""
    grid = {
        "name": "small",
        "recipe": str(RECIPES / "tiny-ranges.yaml"),
        "seeds": [0, 1, 2],
        "bits": [2, 3],
        "folder": str(folder / "out"),
        "strategies": {"mlp": {}, "constant": {"model.budget": {"class_path": "ConstantBudget"}}},
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**grid, **changes}.items() if v is not None}, sort_keys=False))
    return path


@pytest.mark.parametrize("path", GRIDS, ids=lambda p: p.stem)
class TestShippedGrids:
    def test_the_first_line_is_the_command_that_runs_it_and_every_key_has_a_comment(self, path: Path) -> None:
        lines = path.read_text().splitlines()
        assert lines[0] == f"# python -m mobiq_lightning compare --config recipes/compare/{path.name}"
        top = [line for line in lines if ":" in line.split("#")[0] and not line.startswith(" ")]
        assert [line for line in top if "#" not in line] == []

    def test_it_keeps_the_rules_of_comparison(self, path: Path) -> None:
        grid = read_grid(str(path))
        assert len(grid.seeds) >= 3
        for cell in grid.cells():
            assert min(cell.recipe["model"]["eval_bits"]) <= min(grid.bits)
            assert max(cell.recipe["model"]["eval_bits"]) > max(grid.bits)
            assert cell.recipe["data"]["seed"] == cell.recipe["seed_everything"] == cell.seed

    @pytest.mark.e2e  # a command line is parsed for each of them, which takes seconds
    def test_all_its_strategies_can_be_built(self, path: Path) -> None:
        cells = read_grid(str(path)).cells()
        broken = {**cells[0].recipe["model"], "budget": {"class_path": "ConstantBudget", "init_args": {"bits": "many"}}}
        wrong = replace(cells[0], strategy="wrong", recipe={**cells[0].recipe, "model": broken})
        with pytest.raises(RecipeError) as raised:
            check_cells([*cells, wrong])
        assert re.findall(r"^strategies\.(.*?):", str(raised.value), re.MULTILINE) == ["wrong"]


def test_a_change_replaces_a_class_with_its_arguments_or_one_argument_alone(tmp_path: Path) -> None:
    strategies = {
        "one": {"model.slices.init_args.group_size": 32},
        "whole": {"model.slices": {"class_path": "ResidualSlices", "init_args": {"slice_bits": [2, 2]}}},
        "nested": {"model": {"rates": {"ranges": 0.5}}},
    }
    one, whole, nested = read_grid(str(write_grid(tmp_path, strategies=strategies, seeds=[0]))).cells()
    assert one.recipe["model"]["slices"]["init_args"] == {"slice_bits": [2, 1, 1, 2, 2], "group_size": 32}
    assert whole.recipe["model"]["slices"]["init_args"] == {"slice_bits": [2, 2]}
    assert nested.recipe["model"]["rates"] == {**one.recipe["model"]["rates"], "ranges": 0.5}
    assert one.recipe["model"]["rates"]["routers"] == nested.recipe["model"]["rates"]["routers"]
    assert nested.changes == {"model.rates.ranges": 0.5}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"seed": [0]}, "seed: no such key. Did you mean 'seeds'"),
    ({"seeds": []}, "seeds: none is given"),
    ({"seeds": None}, "seeds: missing"),
    ({"seeds": [1, 1]}, "holds one twice"),
    ({"seeds": ["a"]}, "a list of whole numbers is expected"),
    ({"bits": []}, "bits: []; a list of numbers is expected"),
    ({"strategies": {}}, "strategies: none is given"),
    ({"strategies": {"a/b": {}}}, "cannot name a folder"),
    ({"strategies": {"Mlp": {}, "mlp": {}}}, "would share a folder"),
    ({"strategies": {"x": {"model.budgt": 1}}}, "strategies.x: model.budgt: no such key. Did you mean 'model.budget'"),
    ({"strategies": {"x": {"model.budget": "LinaerBudget"}}}, "strategies.x: model.budget: no class 'LinaerBudget'"),
    ({"strategies": {"x": {"model.router": "ResidualSlices"}}}, "no class 'ResidualSlices'"),
    ({"strategies": {"x": {"model.router": "collections.Counter"}}}, "strategies.x: "),
    (
        {"strategies": {"x": {"model.epochs_per_block": 0}}},
        "model.epochs_per_block: 0 is out of range; a whole number of at least 1",
    ),
    ({"strategies": {"x": {"model.pretrained": "other"}}}, "x: model.pretrained: strategies are compared on one model"),
    ({"strategies": {"x": {"data.eval_seq_len": 8}}}, "x: data.eval_seq_len: strategies are compared on one model"),
    ({"changes": {"data.seed": 3}}, "changes: data.seed: the grid itself sets it in every cell"),
    ({"strategies": {"x": {"seed_everything": 3}}}, "x: seed_everything: the grid itself sets it"),
    ({"recipe": "nowhere.yaml"}, "no such file"),
    ({"workers": 0}, "workers: 0"),
    ({"workers": 1.5}, "workers: 1.5; a number of at least 1 and at most 1024, or auto is expected"),
    ({"workers": True}, "workers: True"),
    ({"folder": 3}, "folder: 3; the path of a folder is expected"),
    ({"wandb": 3}, "wandb: 3; a mapping of arguments of WandbLogger to values, or null is expected"),
    ({"recipe": 3}, "recipe: 3; the path of a recipe, or the name of a shipped one is expected"),
    ({"recipe": "{model: {}}"}, "recipe: '{model: {}}'; the path of a recipe"),
    ({"name": 3}, "name: 3; a text that can name a folder is expected"),
    ({"name": "x" * 300}, "cannot name a folder"),
    ({"title": []}, "title: []; a text is expected"),
    ({"changes": [1]}, "changes: [1]; a mapping of keys of the recipe to values is expected"),
    ({"strategies": 3}, "strategies: 3; a mapping of names to the keys of the recipe"),
    ({"strategies": {"x": 3}}, "strategies.x: 3; a mapping of keys of the recipe to values is expected"),
    ({"strategies": {3: {}}}, "strategies: 3 cannot name a folder; use letters, digits and . _ + = -, at most 100"),
    ({"strategies": {"x": {"model": 3}}}, "strategies.x: model: 3; a mapping of keys to values is expected"),
    ({"strategies": {"x": {"trainer": None}}}, "strategies.x: trainer: None; a mapping of keys to values is expected"),
    ({"strategies": {"x": {"model.rates": 1}}}, "strategies.x: model.rates: 1; a mapping of keys to values"),
    ({"strategies": {"x": {"model.epochs_per_block.y": 1}}}, "strategies.x: model.epochs_per_block: {'y': 1}"),
    ({"seeds": {}}, "seeds: none is given"),
    ({"seeds": [2**40]}, "seeds: [1099511627776]; a list of whole numbers is expected, from 0 to 4294967295"),
    ({"seeds": [*range(600)]}, "2 strategies x 600 seeds are more cells than the 1000 that are run"),
    ({"bits": [float("inf")]}, "bits: [inf]; a list of numbers is expected"),
    ({"bits": [True]}, "bits: [True]; a list of numbers is expected"),
    ({"bits": [0]}, "bits: [0]; a list of numbers is expected"),
    ({"bits": [10**400]}, "bits: [1000"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_wrong_grid_is_answered_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert main(["compare", "--config", str(write_grid(tmp_path, **changes))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_where_a_file_is_to_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "table.json").mkdir()
    grid = read_grid(str(write_grid(tmp_path, folder=str(tmp_path))))
    with pytest.raises(RunFolderError, match=r"table\.json is a folder, and a file table\.json is written there"):
        ComparisonFolder(tmp_path).claim(grid, grid.cells(), overwrite=True)
    assert (tmp_path / "table.json").is_dir()
    assert not (tmp_path / "comparison.json").exists()


def test_two_cells_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write_grid(tmp_path)
    path.write_text(path.read_text().replace("  mlp: {}\n", "  mlp: {}\n  mlp: {model.rates.ranges: 1}\n"))
    with pytest.raises(RecipeError, match="mlp is there twice; two things need two names"):
        read_grid(str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--conifg", "x"], "no such option. Did you mean 'config'"),
        (["--config"], "a value is missing"),
        ([], "--config is missing"),
        (["--config", "GRID", "--model.rates.rangs", "1"], "model.rates.rangs: no such key"),
        (["--config", "GRID", "--model.budget", "LinearBudget"], "the strategies constant set it themselves"),
    ],
)
def test_a_wrong_command_line_is_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    path = str(write_grid(tmp_path))
    assert main(["compare", *[path if a == "GRID" else a for a in arguments]]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"- a\n", "holds no recipe"),
        (b"bits: [.nan]", ".nan is not a number"),
        (b"[" * 5000, "is nested more than 64 deep"),
        (b"name: &a [*a]", "contains itself"),
        (b"null: 1", "'null' is a key that is no name"),
    ],
)
def test_a_file_that_is_no_grid_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "grid.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=re.escape(message)):
        read_grid(str(tmp_path / "grid.yaml"))


def test_a_base_recipe_that_is_wrong_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: 3")
    with pytest.raises(RecipeError) as raised:
        read_grid(str(write_grid(tmp_path, recipe="base.yaml")))
    assert str(raised.value).endswith("recipe: model: 3; a mapping of keys to values is expected")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"seeds": 3}, "seeds: 3; a list of whole numbers is expected"),
        ({"seeds": "012"}, "seeds: '012'; a list of whole numbers"),
        ({"seeds": ()}, "seeds: none is given"),
        ({"bits": 3}, "bits: 3; a list of numbers"),
        ({"bits": [float("nan")]}, "bits: [nan]; a list of numbers"),
        ({"folder": 3}, "folder: 3; the path of a folder"),
        ({"workers": "many"}, "workers: 'many'; a number of at least 1"),
        ({"overwrite": 3}, "overwrite (3) must be True or False"),
        ({"model": {"rates": {"ranges": object}}}, "is nothing that a recipe can say"),
        ({"nothing": 3}, "nothing: no such key"),
        ({"folder": "/dev/null/x"}, "/dev/null/x: this folder cannot be made"),
    ],
)
def test_an_argument_of_the_function_that_is_wrong_is_named(tmp_path: Path, call: dict[str, Any], message: str) -> None:
    with pytest.raises(MobiqError) as raised:
        mobiq_lightning.compare(write_grid(tmp_path), **call)
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_infinite_figure_spoils_neither_table_nor_verdicts() -> None:
    rows = rows_of("a", router=[70.0, math.inf, 71.0], static=[72.0, 73.0, 74.0])
    rows += rows_of("b", router=[70.0, 71.0, 72.0], static=[math.nan, math.nan, math.nan])
    points = points_of(rows, [2, 2.4, 2.5])
    table = {(row.strategy, row.allocation, row.used_bits): row for row in long_table(points)}
    assert table["a", "router", 2.5].perplexity_mean == table["a", "router", 2.4].perplexity_mean == math.inf
    assert table["a", "router", 2.5].perplexity_spread is None
    assert math.isfinite(table["a", "router", 2].perplexity_mean)
    said = verdicts(points, ["a", "b"], [2, 2.4, 2.5], 3)
    assert said[0].startswith("a: routing beats static at 2.4 bits")
    assert lead(points["b", "router", 2.5], points["b", "static", 2.5]) is None


def curve(*points: tuple[float, float], allocation: Allocation = "router") -> list[Row]:
    return [Row(allocation, bits, bits, bits + 0.5, perplexity, kl=0.1, seed=None) for bits, perplexity in points]


def test_a_curve_is_interpolated_in_the_logarithm_and_never_extrapolated() -> None:
    rows = curve((2.0, 100.0), (3.0, 25.0), (4.02, 20.0))
    assert at_bits(rows, 2.5).perplexity == pytest.approx(50.0)  # type: ignore[union-attr]
    assert at_bits(rows, 3.0).perplexity == pytest.approx(25.0)  # type: ignore[union-attr]
    assert at_bits(rows, 4.05).perplexity == pytest.approx(20.0)  # type: ignore[union-attr]
    assert at_bits(rows, 4.2) is None
    assert at_bits(rows, 1.9) is None
    assert at_bits([], 2.0) is None


def rows_of(strategy: str, **by_allocation: list[float]) -> list[CellRow]:
    """Rows at 2, 2.5 and 3 used bits: the perplexity at 2.5 bits is given for each seed."""
    rows = []
    for allocation, values in by_allocation.items():
        for seed, value in enumerate(values):
            found = curve((2.0, 80.0), (2.5, value), (3.0, 60.0), allocation=cast(Allocation, allocation))
            rows += [CellRow(strategy, seed, row) for row in found]
    return rows


class TestLongTable:
    def test_it_holds_mean_and_spread_over_seeds(self) -> None:
        table = long_table(points_of(rows_of("a", router=[69.0, 70.0, 71.0], static=[72.0, 72.0, 72.0]), [2.5]))
        router, static = table
        assert router.allocation == "router"
        assert router.perplexity_mean == pytest.approx(70.0)
        assert router.perplexity_spread == pytest.approx(1.0)
        assert (static.n, static.perplexity_spread) == (3, pytest.approx(0.0))

    def test_rounding_is_not_interpolated_between_its_whole_bits(self) -> None:
        rows = [CellRow("a", 0, row) for row in curve((2.0, 80.0), (3.0, 60.0), allocation="rtn")]
        assert [row.used_bits for row in long_table(points_of(rows, [2, 2.5, 3]))] == [2, 3]

    def test_one_seed_has_no_spread(self) -> None:
        assert long_table(points_of(rows_of("a", router=[70.0]), [2.5]))[0].perplexity_spread is None


class TestVerdicts:
    def says(self, seeds: int = 3, **allocations: list[float]) -> str:
        points = points_of(rows_of("mlp", **allocations), [2.0, 2.5])
        return "\n".join(verdicts(points, ["mlp"], [2.0, 2.5], seeds))

    def test_a_lead_over_both_controls_beyond_the_spread_is_a_win(self) -> None:
        said = self.says(router=[69.0, 69.1, 69.2], static=[75.0, 74.0, 73.0], random=[70.0, 70.1, 70.2])
        assert said.startswith("mlp: routing beats both static and random at 2.5 bits (+7.")
        assert said.endswith("against static, +1.45 % ± 0.00 against random).")

    def test_a_lead_over_one_control_alone_is_none(self) -> None:
        said = self.says(router=[69.0, 69.1, 69.2], static=[75.0, 65.0, 72.0], random=[70.0, 70.1, 70.2])
        assert "beats static and random together nowhere; level with one, within the spread over seeds or 0.1%" in said

    def test_a_defeat_by_one_control_is_said(self) -> None:
        said = self.says(router=[69.0, 69.1, 69.2], static=[68.0, 68.1, 68.0], random=[70.0, 70.1, 70.2])
        assert "together nowhere; it is behind one of them at 2.5 bits (-1.5" in said

    def test_it_is_ahead_only_if_ahead_of_every_control_that_was_measured(self) -> None:
        router, worse = [69.0, 69.1, 69.2], [70.0, 70.1, 70.2]
        found = {"router": router, "static": worse, "shuffled": worse, "random": worse}
        said = self.says(**found)
        assert said.startswith("mlp: routing beats all of static, shuffled and random at 2.5 bits (+1.45")
        said = self.says(**found, layers=[68.0, 68.1, 68.2])
        assert said.startswith(
            "mlp: routing beats static, best layers, shuffled and random together nowhere; it is behind"
        )
        assert "-1.47 % ± 0.00 against best layers" in said

    def test_few_seeds_are_called_few(self) -> None:
        said = self.says(seeds=1, router=[69.0], static=[75.0], random=[70.0])
        assert said.startswith("This comparison has 1 seed; with fewer than 3")

    def test_strategies_are_compared_seed_by_seed(self) -> None:
        # Seeds differ by far more than the strategies; paired, the difference is still clear.
        rows = rows_of("a", router=[60.0, 70.0, 80.0]) + rows_of("b", router=[61.2, 71.4, 81.6])
        assert lead(*(points_of(rows, [2.5])[name, "router", 2.5] for name in "ab")).spread == pytest.approx(
            0, abs=1e-9
        )  # type: ignore[union-attr]
        said = verdicts(points_of(rows, [2.5]), ["a", "b"], [2.5], 3)
        assert (
            said[-1] == "At 2.5 used bits a has the lowest perplexity, clearly ahead of b (+2.00 % ± 0.00); b is last."
        )

    def test_equal_strategies_are_called_equal(self) -> None:
        rows = rows_of("a", router=[70.0] * 3) + rows_of("b", router=[70.0] * 3)
        assert "At 2.5 used bits all strategies give the same perplexity." in verdicts(
            points_of(rows, [2.5]), ["a", "b"], [2.5], 3
        )


class TestAllIn:
    """Verdicts at equal all-in bits: perplexities of a seed at used bits 2, 3 and 4, scales of 0.5 bits beside them."""

    def rows(self, strategy: str, allocation: Allocation, beside: float, *seeds: list[float]) -> list[CellRow]:
        return [
            CellRow(strategy, seed, Row(allocation, bits, bits, bits + beside, perplexity, kl=0.1, seed=None))
            for seed, values in enumerate(seeds)
            for bits, perplexity in zip((2.0, 3.0, 4.0), values, strict=True)
        ]

    def test_a_control_may_spend_what_the_router_stores_of_its_own(self) -> None:
        rows = self.rows("mlp", "router", 1.0, [20.0, 14.0, 10.0], [40.0, 28.0, 20.0], [20.0, 14.0, 10.0])
        rows += self.rows("mlp", "static", 0.5, [20.0, 16.0, 11.0], [40.0, 32.0, 22.0], [20.0, 16.0, 11.0])
        # At 2 + 1 bits the control is taken halfway from 2.5 to 3.5 (18), then 13.5, and at the end of its curve (11).
        assert all_in_verdicts(rows, ["mlp"], [2, 3, 4]) == [
            "mlp, at equal all-in bits, the router's own 0.50 bits per weight counted: routing beats static at 4 bits "
            "(+10.00 % ± 0.00 against static); it is behind one of them at 2 bits (-11.11 % ± 0.00 against static), "
            "3 bits (-3.70 % ± 0.00 against static)."
        ]
        assert verdicts(points_of(rows, [2, 3, 4]), ["mlp"], [2, 3, 4], 3)[0].startswith(
            "mlp: routing beats static at 3"
        )

    def test_a_lead_within_the_spread_over_seeds_is_none(self) -> None:
        rows = self.rows("mlp", "router", 1.0, [20.0, 14.0, 10.0], [20.0, 14.0, 10.0])
        rows += self.rows("mlp", "static", 0.5, [20.0, 16.0, 11.0], [20.0, 19.0, 11.0])
        said = all_in_verdicts(rows, ["mlp"], [3])[0]
        assert "beats static nowhere; level with one, within the spread over seeds or 0.1%, at 3 bits (+1.6" in said

    def test_draws_of_one_run_are_one_control(self) -> None:
        rows = self.rows("mlp", "router", 0.6, [20.0, 14.0, 10.0])
        for seed, change in ((0, -1.0), (1, 1.0)):
            drawn = self.rows("mlp", "random", 0.5, [20.0 + change, 16.0 + change, 11.0 + change])
            rows += [replace(one, row=replace(one.row, seed=seed)) for one in drawn]
        assert "routing beats random at 3 bits (+10.71 % against random)" in all_in_verdicts(rows, ["mlp"], [3])[0]

    def test_a_router_that_stores_nothing_changes_nothing(self) -> None:
        rows = self.rows("static", "router", 0.5, [20.0, 14.0, 10.0]) + self.rows("static", "static", 0.5, [20.0] * 3)
        said = "static, at equal all-in bits: the same, as its router stores nothing of its own."
        assert all_in_verdicts(rows, ["static"], [2, 3]) == [said]
        assert all_in_verdicts(rows[:3], ["static"], [2, 3]) == []

    def test_strategies_meet_at_the_bits_of_the_one_that_stores_least(self) -> None:
        rows = self.rows("scales", "router", 0.5, [20.0, 15.0, 11.0], [20.0, 15.0, 11.0])
        rows += self.rows("router", "router", 1.0, [20.0, 14.0, 10.0], [20.0, 14.0, 10.0])
        rows += self.rows("tables", "router", 87.0, [9.0] * 3, [9.0] * 3)
        assert all_in_verdicts(rows, ["scales", "router", "tables"], [2, 3, 4]) == [
            "Bits per weight beside the code bits (scales, tables, routers), which equal used bits leave out: scales 0.50, "
            "router 1.00, tables 87.00.",
            "At 3.50 all-in bits scales has the lowest perplexity, clearly ahead of router (+13.33 % ± 0.00); router is "
            "last; tables takes more bits at the least.",
            "At 4.50 all-in bits scales has the lowest perplexity, clearly ahead of router (+9.09 % ± 0.00); router is "
            "last; tables takes more bits at the least.",
        ]

    def test_strategies_that_store_as_much_are_compared_once(self) -> None:
        rows = self.rows("a", "router", 0.5, [20.0, 15.0, 12.0]) + self.rows("b", "router", 0.505, [20.0, 14.0, 12.0])
        assert all_in_verdicts(rows, ["a", "b"], [2, 3, 4]) == []

    def test_infinite_figures_leave_out_what_they_touch(self) -> None:
        rows = self.rows("mlp", "router", 1.0, [20.0, math.inf, 10.0]) + self.rows(
            "mlp", "static", 0.5, [math.nan, 16.0, 9.0]
        )
        said = all_in_verdicts(rows, ["mlp"], [2, 3, 4])
        assert len(said) == 1
        assert "nowhere; it is behind one of them at 4 bits (-11.11 % against static)." in said[0]
        zero = self.rows("mlp", "router", 1.0, [0.0] * 3) + self.rows("mlp", "static", 0.5, [0.0, 16.0, 9.0])
        assert "routing beats static at 2 bits" in all_in_verdicts(zero, ["mlp"], [2, 3, 4])[0]


def test_a_lead_is_a_ratio_of_perplexities() -> None:
    points = points_of(rows_of("a", router=[50.0], random=[55.0]), [2.5])
    found = lead(points["a", "router", 2.5], points["a", "random", 2.5])
    assert found is not None
    assert math.exp(found.mean) == pytest.approx(1.1)
    assert str(found) == "+10.00 %"


def test_starting_anew_removes_the_charts_of_the_report_and_no_other_picture(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text('<section id="pareto-kl">\n<h2>KL</h2>')
    for name in ("pareto-kl.png", "holiday.png", "notes.txt"):
        (tmp_path / name).write_text("x")
    folder = ComparisonFolder(tmp_path)
    assert folder.charts() == [tmp_path / "pareto-kl.png"]
    folder.clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["holiday.png", "notes.txt"]
    folder.clear()
