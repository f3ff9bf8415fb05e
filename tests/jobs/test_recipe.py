"""Recipes: what is in the folder fits the real command line, and what is wrong is answered at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import mobiq_lightning
from mobiq_lightning.cli import main
from mobiq_lightning.commands.recipes import copy
from mobiq_lightning.comparison.grid import read_grid
from mobiq_lightning.errors import RecipeError
from mobiq_lightning.jobs import check_recipe, known_names, parse_value
from mobiq_lightning.jobs.arguments import command_line
from mobiq_lightning.jobs.known_names import strategy_classes
from mobiq_lightning.jobs.recipe import check_arguments

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
class TestShippedRecipes:
    def test_the_first_line_is_the_command_that_runs_it(self, path: Path) -> None:
        first = path.read_text().splitlines()[0]
        command = "outliers" if path.stem == "outliers" else "fit"
        assert first.startswith(f"# python -m mobiq_lightning {command} --config recipes/{path.name}")

    def test_every_key_has_a_comment(self, path: Path) -> None:
        lines = path.read_text().splitlines()
        bare = [
            line
            for number, line in enumerate(lines)
            if ":" in line.split("#")[0]
            and "#" not in line
            and line.split(":")[0].strip() not in ("model", "data", "trainer", "class_path", "init_args")
            and not lines[number - 1].lstrip().startswith("#")
        ]
        assert bare == []

    def test_it_parses_and_its_plug_ins_build_on_a_tiny_layer(self, path: Path, tmp_path: Path) -> None:
        from mobiq_lightning.jobs import ElasticCLI
        from mobiq_lightning.jobs.quiet import quiet_libraries
        from mobiq_lightning.runs import RunFolder

        folder = f"--trainer.default_root_dir={tmp_path / 'run'}"
        with quiet_libraries():
            cli = ElasticCLI(
                "fit", ["--config", str(path), folder, "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
            )
        scheme = cli.model.slices(8, 20)
        assert cli.model.router(20, len(scheme.slice_bits)).n_slices == len(scheme.slice_bits)
        assert scheme.depths[0] <= cli.model.budget(0.5) <= scheme.depths[-1]
        assert RunFolder(tmp_path / "run").path.joinpath("config.yaml").is_file()


def test_stages_of_the_command_line_replace_those_of_the_recipe_whole(tmp_path: Path) -> None:
    from mobiq_lightning.jobs import ElasticCLI
    from mobiq_lightning.jobs.quiet import quiet_libraries

    path = next(p for p in RECIPES if p.stem == "tiny")
    stages = "[" + ", ".join(["{train: [routers], epochs: 1}"] * 10) + "]"  # as many as the recipe has
    folder = f"--trainer.default_root_dir={tmp_path / 'run'}"
    for given in ([f"--model.stages={stages}"], ["--model.stages", stages]):
        with quiet_libraries():
            cli = ElasticCLI("build", ["--config", str(path), folder, *given])
        assert len(cli.model.stages) == 10
        assert all(s.depth is None and s.scope == "block" and not s.other_depths for s in cli.model.stages)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"modle": {}}, "modle: no such key. Did you mean 'model"),
        ({"model": {"slice": 1}}, "model.slice: no such key. Did you mean 'model.slices'"),
        ({"model": {"stages": [{"depht": 2}]}}, "model.stages[0].depht: no such key. Did you mean 'depth'"),
        (
            {"model": {"stages": [{"train": ["range"]}]}},
            "model.stages[0].train: no such word 'range'. Did you mean 'ranges'",
        ),
        (
            {"model": {"stages": [{"bounds": ["roundng"]}]}},
            "model.stages[0].bounds: no such word 'roundng'. Did you mean",
        ),
        (
            {"model": {"stages": [{"train": ["slices"]}]}},
            "model.stages[0].train: slices: renamed to ranges, transforms",
        ),
        (
            {"model": {"stages": [{"train": ["ranges"]}, {"train": ["weights"]}]}},
            "model.stages[1].train: weights: renamed to codes",
        ),
        ({"model": {"stages": [{"train": ["clipping"]}]}}, "clipping: renamed to ranges, with bounds: [clipping]"),
        ({"model": {"stages": [{"train": ["rounding"]}]}}, "rounding: renamed to codes, with bounds: [rounding]"),
        ({"model": {"slices_lr": 1.0}}, "model.slices_lr: renamed to model.rates.ranges"),
        ({"model": {"weights_lr": 1.0}}, "model.weights_lr: renamed to model.rates.codes"),
        ({"model": {"transform_lr": 1.0}}, "model.transform_lr: renamed to model.rates.transforms"),
        ({"model": {"router_lr": 1.0}}, "model.router_lr: renamed to model.rates.routers"),
        ({"model": {"rates": {"rangs": 1.0}}}, "model.rates.rangs: no such key. Did you mean 'ranges'"),
        ({"model": {"layout": {"block": "model.layers"}}}, "model.layout.block: no such key. Did you mean 'blocks'"),
        ({"data": {"n_sample": 1}}, "Did you mean 'data.n_samples'"),
        ({"trainer": {"max_epoch": 1}}, "Did you mean 'trainer.max_epochs'"),
        ({"model": {"seq_len": 1}}, "Did you mean 'data.seq_len'"),
        ({"model": {"router": "MLPRoter"}}, "Did you mean 'MLPRouter'"),
        ({"model": {"budget": {"class_path": "CosinBudget"}}}, "Did you mean 'CosineBudget'"),
        ({"model": {"slices": {"class_path": "ResidualSlices", "init_args": {"group": 4}}}}, "'group_size'"),
        ({"model": {"slices": {"class_path": "ResidualSlices", "group_size": 4}}}, "go under init_args"),
        ({"model": {"budget": {"class_path": "LinearBudget", "init_args": {"end": 4}}}}, "'end_bits'"),
    ],
)
def test_a_wrong_key_or_class_gets_the_nearest_name(recipe: dict, message: str) -> None:  # type: ignore[type-arg]
    problems = check_recipe(recipe)
    assert len(problems) == 1
    assert message in problems[0]


@pytest.mark.parametrize("source", [None, "def Trainer(", "class Trainer(Base): ...", "Trainer = Base"])
def test_a_trainer_whose_source_cannot_be_read_is_left_to_the_parser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None
) -> None:
    place = tmp_path / "pytorch" / "trainer"
    place.mkdir(parents=True)
    if source is not None:
        (place / "trainer.py").write_text(source)
    monkeypatch.setattr(
        known_names.importlib.util, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    known_names.accepted_keys.cache_clear()
    try:
        assert check_recipe({"trainer": {"max_epoch": 1}}) == []
        assert "Did you mean 'model.slices'" in check_recipe({"model": {"slice": 1}})[0]
    finally:
        known_names.accepted_keys.cache_clear()


def test_every_problem_of_a_recipe_is_named_at_once() -> None:
    assert len(check_recipe({"model": {"slice": 1, "rooter": 2}, "date": {}})) == 3


def test_somebodys_own_class_is_left_to_the_parser() -> None:
    assert check_recipe({"model": {"router": {"class_path": "my.package.Router", "init_args": {"x": 1}}}}) == []


def test_arguments_of_strategies_are_those_that_a_recipe_gives() -> None:
    assert strategy_classes("slices")["ResidualSlices"] == ("slice_bits", "group_size")
    assert strategy_classes("budgets")["CosineBudget"] == ("start_bits", "end_bits")
    assert strategy_classes("routers")["RandomRouter"] == ("seed",)
    assert strategy_classes("routers")["ErrorSketchRouter"] == ("n_projections", "seed")  # its base takes n_rows
    assert strategy_classes("routers")["LinearRouter"] == ()
    assert strategy_classes("budgets")["ListedBudget"] == ("points",)


def test_typos_and_help_do_not_wait_for_heavy_imports(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"model": {"slice": 1}}))
    code = (
        "import sys; from mobiq_lightning.cli import main; "
        f"main(['--help']); assert main(['fit', '--config', {str(recipe)!r}]) == 2; "
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'jsonargparse'} & {*sys.modules}; assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Did you mean 'model.slices'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fti"], "no command 'fti'. Did you mean 'fit'"),
        (["fit", "--config", "recipes/tini.yaml"], "no such file"),
        (["fit", "--model.slice", "1"], "Did you mean 'model.slices'"),
        (["fit", "--model.slices_lr=1"], "model.slices_lr: renamed to model.rates.ranges"),
        (["fit", "--model", "{slices_lr: 1}"], "model.slices_lr: renamed to model.rates.ranges"),
        (["fit", "--model={stages: [{train: [weights]}]}"], "model.stages[0].train: weights: renamed to codes"),
        (["fit", "--model.stages=[{train: slices}]"], "model.stages[0].train: slices: renamed to ranges, transforms"),
        (["fit", "--model.router_lr", "1"], "model.router_lr: renamed to model.rates.routers"),
        (["fit", "--model.rates.rooters=1"], "model.rates.rooters: no such key. Did you mean 'routers'"),
        (["fit", "--model.rates={codez: 1}"], "model.rates.codez: no such key. Did you mean 'codes'"),
        (["fit", "--model.stages=[{train: [weights]}]"], "model.stages[0].train: weights: renamed to codes"),
        (["fit", "--model.router", "MLPRoter"], "Did you mean 'MLPRouter'"),
        (["fit", "--config", str(RECIPES[-1]), "--model.router.init_args.hiden=3"], "Did you mean 'hidden_features'"),
        (["fit", "--config", str(RECIPES[-1]), "--model.slices.groupsize", "3"], "Did you mean 'group_size'"),
        (["fit", "--model.budget=CosineBudget", "--model.budget.start=3"], "Did you mean 'start_bits'"),
        (["fit", "--model.budget=ListedBudget", "--model.budget.point=[[0, 6]]"], "Did you mean 'points'"),
        (["fit", "--model.router=SketchRouter"], "Did you mean 'ErrorSketchRouter'"),
        (["fit", "--model.router=ErrorSketchRouter", "--model.router.projections=4"], "Did you mean 'n_projections'"),
        (["fit", "--model.router=LinearRouter", "--model.router.hidden_features=4"], "It has none"),
        (["fit"], "Give a recipe"),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_recipe_that_is_no_yaml_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("model: [unclosed")
    assert main(["fit", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "is not valid YAML" in capsys.readouterr().err
    (tmp_path / "b.yaml").write_text("just text")
    assert main(["fit", "--config", str(tmp_path / "b.yaml")]) == 2
    assert "holds no recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe bad", "is not UTF-8 text"),
        (b"model: {router: {class_path: MLPRouter, init_args: [1]}}", "model.router.init_args: [1] is no mapping"),
        (b"model: {router: {class_path: MLPRouter, init_args: {1: 2}}}", "model.router.init_args.1: MLPRouter has no"),
        (b"1: 2", "1: no such key"),
        ("seed_everything: 0".encode("utf-16"), "is not UTF-8 text"),
        (b"[" * 5000, "is nested more than 64 deep"),
        (b"model: " + b"[" * 70 + b"]" * 70, "is nested more than 64 deep"),
        (b"seed_everything: " + b"9" * 5000, "is not valid YAML"),
        (b"model: &a [*a]", "holds a value that contains itself"),
        (b"- a", "holds no recipe: a mapping of keys such as seed_everything"),
        (b"", "holds no recipe"),
        (b"model: {pretrained: 2020-01-01}", "2020-01-01 is a date; put it into quotes (line 1, column 21)"),
        (b"model: {pretrained: !!binary aGFsbG8=}", "aGFsbG8= is bytes"),
        (b"model: {random_seeds: !!set {1, 2}}", "this is a set; give a list"),
        (b"model: {null: 1}", "'null' is a key that is no name"),
        (b"model: {1.5: 1}", "'1.5' is a key that is no name"),
        (b"model: {yes: 1}", "'yes' is a key that is no name"),
        (b"model: {2020-01-01: 1}", "'2020-01-01' is a key that is no name"),
        (b"? [a]\n: 1", "'a list or mapping' is a key that is no name"),
        (b"data: {seed: 1}\ndata: {seed: 2}", "data is there twice; two things need two names (line 2, column 1)"),
        (b"model: {rates: {ranges: .nan}}", ".nan is not a number (line 1"),
        (b'model: {pretrained: "\\ud800"}', "half of a character"),
        (b"model: 3", "model: 3; a mapping of keys to values is expected"),
        (b"model: {rates: 3}", "model.rates: 3; a mapping of keys to values is expected"),
        (b"model: {router: {class_path: 3}}", "model.router: 3 names no class"),
        (b"model: {router: 3}", "model.router: 3 names no class"),
        (b"seed_everything: -1", "seed_everything: -1 is out of range; a whole number of at least 0 and at most 4,294"),
        (b"data: {n_samples: 0}", "data.n_samples: 0 is out of range; a whole number of at least 1"),
        (b"data: {seq_len: -3}", "data.seq_len: -3 is out of range"),
        (b"data: {n_generated: -1}", "data.n_generated: -1 is out of range; a whole number of at least 0"),
        (b"data: {eval_max_windows: 1.5}", "data.eval_max_windows: 1.5 is out of range"),
        (b"model: {eval_bits: []}", "model.eval_bits: the list is empty"),
        (b"model: {eval_bits: [2, .inf]}", "model.eval_bits: inf is out of range; a list of numbers of at least 1"),
        (b"model: {eval_bits: 3}", "model.eval_bits: 3; a list of numbers of at least 1 and at most 8 is expected"),
        (b"model: {random_seeds: [-1]}", "model.random_seeds: -1 is out of range"),
        (b"model: {rates: {routers: 0}}", "model.rates.routers: 0 is out of range; a number above 0"),
        (b"model: {rates: {ranges: -1.0}}", "model.rates.ranges: -1.0 is out of range"),
    ],
)
def test_what_is_no_recipe_is_answered_in_a_line(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=re.escape(said)):
        check_arguments(["--config", str(tmp_path / "bad.yaml")])


def test_a_recipe_that_multiplies_by_aliases_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join([*lines, "model: {eval_bits: *a8}"]))
    with pytest.raises(RecipeError, match=r"stands for [0-9]+ values"):
        check_arguments(["--config", str(tmp_path / "bomb.yaml")])
    # The parser of keys would read a file that a value names.
    with pytest.raises(RecipeError, match=r"stands for [0-9]+ values"):
        check_arguments(["--model.router", str(tmp_path / "bomb.yaml")])


def test_a_recipe_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(RecipeError, match="is a named pipe, not a regular file"):
        check_arguments(["--config", str(tmp_path / "pipe.yaml")])
    with pytest.raises(RecipeError, match=r"is a folder without config\.yaml"):
        check_arguments(["--config", str(tmp_path)])
    with pytest.raises(RecipeError, match="the recipe holds a value that contains itself"):
        check_arguments(["--config", "{model: &a [*a]}"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.eval_bits", "[" * 5000], "--model.eval_bits is nested more than 64 deep"),
        (["--model.stages", "&a [*a]"], "--model.stages holds a value that contains itself"),
        (["--seed_everything", "9" * 5000], "--seed_everything is not valid YAML"),
        (["--model.eval_bits=[2020-01-01]"], "2020-01-01 is a date"),
        (["--model.rates.ranges", ".nan"], "model.rates.ranges: .nan is no number"),
        (["--model.rates.ranges", "nan"], "model.rates.ranges: nan is out of range"),
        (["--model.rates.ranges=-1"], "model.rates.ranges: -1 is out of range"),
        (["--seed_everything=-1"], "seed_everything: -1 is out of range"),
        (["--model.rates={routers: 0}"], "model.rates.routers: 0 is out of range"),
        (["--model.eval_bits=[]"], "model.eval_bits: the list is empty"),
    ],
)
def test_a_value_of_the_command_line_is_refused_like_one_of_a_recipe(arguments: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        check_arguments(arguments)


def test_values_that_are_no_yaml_are_left_to_the_parser() -> None:
    for value in ("@home/model", "a: b: c", "2020-01-01", "'quoted", "-", "%x"):
        assert parse_value(value, "--model.pretrained") is not None
        check_arguments([f"--model.pretrained={value}"])
    check_arguments(["--model.objective", "BlockReconstruction", "--model.objective.depth_weights", "{2: 1.0, 8: 0.1}"])


def test_a_call_cannot_name_a_second_recipe_among_its_keys() -> None:
    with pytest.raises(RecipeError, match="config: no such key of a recipe"):
        command_line("tiny", {"config": "tiny-ranges"})


def test_a_grid_is_a_file_and_not_its_content() -> None:
    with pytest.raises(RecipeError, match="a grid is a file"):
        read_grid("{name: x}")
    with pytest.raises(RecipeError, match="not as dict"):
        mobiq_lightning.compare({"name": "x"})


@pytest.mark.parametrize("target", ["x" * 300 + ".yaml", "/proc/x.yaml"])
def test_a_recipe_is_not_copied_to_where_nothing_can_be_written(target: str) -> None:
    with pytest.raises(RecipeError, match="cannot be written"):
        copy("tiny", Path(target))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "Parser key \"group_size\":\n  Expected a <class 'int'>. Got value: abc",
            "group_size: abc; a whole number is expected",
        ),
        (
            "Parser key \"a\":\n  Does not validate against any of the Union subtypes\n  Subtypes: [<class 'int'>, "
            "<class 'NoneType'>]\n  Errors:\n    - Expected a <class 'int'>\n    - Expected a <class 'NoneType'>\n"
            "  Given value type: <class 'str'>\n  Given value: x",
            "a: x; a whole number is expected",
        ),
        (
            'Parser key "trainer.callbacks":\n\n  - Does not validate against any of the Union subtypes\n  Errors:\n'
            "    - worse_block: x; one of stop, repair is expected\n    - Not a valid subclass of Callback\n"
            "      Subclass types expect one of:\n      - a class path (str)",
            "trainer.callbacks: worse_block: x; one of stop, repair is expected",
        ),
        (
            'Parser key "model.router":\n\n  - Expected a path but numpy.array either not accessible or invalid\n'
            "  - Type collections.abc.Callable[[int, int], mobiq_lightning.strategies.base.Router] expects a function or a "
            "callable class: 'X' object has no attribute 'returns'. Got value: numpy.array",
            "model.router: numpy.array makes no Router; give a class that does, by its name or dotted path",
        ),
        (
            'Parser key "model.router":\n\n- Expected a path but my_routers.Peak either not accessible or invalid\n'
            "- Type expects a function: No module named 'my_routers'",
            "model.router: no module 'my_routers' is on the Python path. Run `python -m mobiq_lightning` from the folder of its "
            "file, or put that folder into PYTHONPATH",
        ),
        ('Parser key "a.b":\n  Does not validate:\n  - one\n  - two', "a.b: Does not validate: one; two"),
    ],
)
def test_what_the_parser_says_is_one_line_that_begins_with_the_key(message: str, said: str) -> None:
    from mobiq_lightning.jobs.parsing import in_a_line

    assert in_a_line(message) == said
    assert len(in_a_line(message + " x" * 1000)) < 400
