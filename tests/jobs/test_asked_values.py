"""Values that cannot be used are said before anything heavy is imported, each in a line."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.errors import RecipeError
from mobiq_lightning.jobs import without_effect
from mobiq_lightning.jobs.arguments import with_recipe
from mobiq_lightning.jobs.asked import asked_values, first_words
from mobiq_lightning.jobs.asked_checks import FILES
from mobiq_lightning.jobs.recipe import check_arguments


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--data.source=nope.txt", "data.source: 'nope.txt' is neither a file nor one of builtin, wikitext2, c4."),
        ("--data.eval_source=wikitext3", "Did you mean 'wikitext2'?"),
        (f"--data.source={__file__}", "ends in '.py'; .txt, .jsonl and .parquet can be read"),
        ("--model.pretrained=/no/such/model", "model.pretrained: there is no folder /no/such/model"),
        ("--trainer.max_epochs=3", "trainer.max_epochs=3: how many epochs there are follows from"),
        ("--trainer.precision=16-mixed", "trainer.precision=16-mixed: what is learned is float32"),
        ("--trainer.devices=0", "trainer.devices=0: a run needs a device"),
        ("--trainer.max_steps=abc", "trainer.max_steps: 'abc'; a whole number is expected"),
        ("--trainer.enable_progress_bar=perhaps", "trainer.enable_progress_bar: 'perhaps'; true or false is expected"),
        ("--model.router=os.path.join", "model.router: os.path.join is of Python's own library and makes no router"),
        ("--model.router=no_such_package.Router", "model.router: no module 'no_such_package' is on the Python path"),
        ("--model.dtype=float17", "model.dtype: 'float17'; one of auto, float32, bfloat16, float16 is expected"),
        ("--model.hidden_states=ram", "model.hidden_states: 'ram'; one of device, host, disk is expected"),
        ("--model.recompute_blocks=7", "model.recompute_blocks: 7; true or false is expected"),
        ("--data.n_samples=many", "data.n_samples: 'many' is no number; a whole number of at least 1"),
        ("--model.rates.codes=abc", "model.rates.codes: 'abc' is no number; a number above 0"),
        ("--model.eval_bits=[2,a]", "model.eval_bits: 'a' is no number; a list of numbers"),
        ("--model.eval_bits=[1.5,2]", "model.eval_bits: [1.5] lie outside of what the slices give, 2 to 8"),
        ("--model.slices.init_args.slice_bits=[4,4,4]", "model.slices: slice_bits ([4, 4, 4]) add up to 12"),
        ("--model.slices.init_args.slice_bits=[2,0]", "slice_bits ([2, 0]) must be positive integers"),
        ("--model.slices.init_args.group_size=0", "model.slices.init_args.group_size: 0 is out of range"),
        (
            "--model.budget.init_args.low_bits=1",
            "model.budget: low_bits (1): the slices [2, 1, 1, 2, 2] give 2 to 8 bits",
        ),
        ("--model.budget.init_args.low_bits=abc", "model.budget.init_args.low_bits: 'abc'; a number is expected"),
        ("--model.stages=[{train: ranges}]", "model.stages[0].train: 'ranges'; a list is expected"),
        ("--model.stages=[{train: [ranges], epochs: x}]", "model.stages[0].epochs: 'x'; a whole number is expected"),
        ("--model.stages=[{epochs: 1}]", "model.stages[0]: train is missing; give some of ranges, codes"),
        (
            "--model.stages=[{train: [ranges], depth: 5, epochs: 1}]",
            "model.stages[0]: depth 5 is no prefix of the slices",
        ),
    ],
)
def test_a_value_that_cannot_be_used_is_said_in_one_line(argument: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_arguments(with_recipe(["tiny", argument]), FILES)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "argument",
    [
        "--model.slices=ResidualSlices",
        "--model.router=StaticRouter",
        "--model.pretrained=organisation/model",
        "--trainer.devices=2",
        "--trainer.logger=true",
        "--trainer.max_time=00:01:00:00",
        "--model.transform=null",
        "--data.eval_max_windows=null",
        "--data.n_samples=1e2",
    ],
)
def test_a_value_that_can_be_used_is_not_refused(argument: str) -> None:
    arguments = with_recipe(["tiny", argument])
    check_arguments(arguments, FILES)
    asked = asked_values(arguments)
    assert any(name.startswith(argument.removeprefix("--").partition("=")[0]) for name in asked), "it was looked at"


def test_all_values_of_a_command_line_are_said_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        check_arguments(with_recipe(["tiny", "--data.source=no.txt", "--trainer.devices=0", "--model.dtype=x"]), FILES)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "model.dtype",
        "trainer.devices=0",
        "data.source",
    ]


def test_nothing_heavy_is_imported_for_it() -> None:
    code = (
        "import sys; from mobiq_lightning.cli import main; code = main(['fit', 'tiny', '--data.source=no.txt'])\n"
        "print(code, sorted({'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"


def test_what_is_asked_for_is_what_was_said_last(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    content = {"model": {"router": {"class_path": "MLPRouter", "init_args": {"hidden_features": 4}}}}
    recipe.write_text(json.dumps({**content, "data": {"n_samples": 3}}))
    asked = asked_values(["--config", str(recipe), "--data.n_samples", "5"])
    assert asked["data.n_samples"] == 5
    assert asked["model.router.init_args.hidden_features"] == 4
    asked = asked_values(["--config", str(recipe), "--model.router=StaticRouter"])
    assert asked["model.router.class_path"] == "StaticRouter"
    assert "model.router.init_args.hidden_features" not in asked


def test_epochs_of_a_block_that_no_stage_is_a_share_of_are_said_to_be_without_effect() -> None:
    said = without_effect(asked_values(with_recipe(["tiny", "--model.epochs_per_block=3"])))
    assert said[0].startswith("model.epochs_per_block (3) is without effect: no stage of model.stages is a share of it")
    assert without_effect(asked_values(with_recipe(["tiny-ranges", "--model.epochs_per_block=3"]))) == []
    # A recipe in a run folder writes out every default.
    default = inspect.signature(ElasticCalibration).parameters["epochs_per_block"].default
    assert without_effect(asked_values(with_recipe(["tiny", f"--model.epochs_per_block={default}"]))) == []


def test_the_first_words_say_what_is_begun() -> None:
    asked = asked_values(with_recipe(["tiny", "--data.n_generated=8"]))
    assert first_words("fit", asked) == (
        "fit in runs/tiny: model builtin, text builtin and 8 windows that the model writes. Loading PyTorch and Lightning ..."
    )


@pytest.mark.parametrize("name", ["m.gguf", "code.v2"])
def test_a_model_whose_name_has_a_dot_is_taken_for_no_class(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"GGUF") if name.endswith("gguf") else Path(name).mkdir()
    # Whatever else is refused of it, the name is read as a path.
    said = ""
    try:
        check_arguments(with_recipe(["tiny", f"--model.pretrained={name}"]), FILES)
    except RecipeError as error:
        said = str(error)
    assert "no module" not in said
    assert "own library" not in said
