"""One grammar for all commands: help, typos, spellings, exit codes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mobiq_lightning.cli import main
from mobiq_lightning.commands import COMMANDS
from mobiq_lightning.commands.command import Parser, normalized, number_list
from mobiq_lightning.console import program
from mobiq_lightning.errors import RecipeError


def test_the_help_lists_every_command_with_its_usage_and_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert len(COMMANDS) == 12
    for name, command in COMMANDS.items():
        assert f" {name} {command.usage} {command.summary()} " in printed


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_a_help_with_its_options(name: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, flag]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: {program()} {name} ")
    assert COMMANDS[name].summary() in printed
    parser = COMMANDS[name].parser()
    assert all(option in printed for option in parser.options)
    assert max(len(line) for line in printed.splitlines()) <= 130


def test_the_help_of_fit_says_what_each_key_of_a_recipe_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "model.eval_bits             Budgets, in bits, at which the result is compared." in printed
    assert "data.eval_batch_size        Evaluation windows per step" in printed
    assert "trainer.default_root_dir" in printed


def test_outliers_shows_its_own_options_before_keys_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["outliers", "-h"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("--bits") < printed.index("--share") < printed.index("model.pretrained")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe"], "no command 'recipe'. Did you mean 'recipes'"),
        (["generate", "run", "--promt", "x"], "generate: --promt: no such option. Did you mean 'prompt'"),
        (["export", "run", "--too=x"], "export: --too: no such option. Did you mean 'to'"),
        (["verify", "run", "--max-bits", "3"], "verify: --max-bits: no such option"),
        (["inspect"], "inspect: missing: RUN"),
        (["generate", "run", "--bits", "many"], "--bits: 'many'; a number above 0 and at most 8 is expected"),
        (["generate", "run", "--max-new-tokens"], "--max-new-tokens: a value is missing"),
        (["verify", "run", "another"], "verify: unrecognized arguments: another"),
        (["latency", "--warm"], "latency: --warm: no such option. Did you mean 'warm-up'"),
        (["outliers", "--bits"], "outliers: --bits: a value is missing"),
        (["fit", "--overwritten"], "overwritten: no such key. Did you mean 'overwrite'"),
        (["fit", "tini"], "tini: no such file, run folder or shipped recipe. Did you mean 'tiny'"),
        (["fit", "nope"], "nope: no such file, run folder or shipped recipe. Shipped are llama2-7b"),
        (["validate", "nope"], "nope: no such file, run folder or shipped recipe. Shipped are llama2-7b"),
        (["fit", ""], "'': no such file"),
        (["fit", "x" * 5000], "xxx...: no such file"),
        (["fit", "a\nb"], "'a\\nb': no such file"),
        (["fit", "."], ". is a folder without config.yaml: neither a recipe nor a run folder"),
        (["fit", "tiny", "extra"], "'extra': one recipe is taken, and keys of it"),
        (["fit", "tiny", "--model.eval_bits"], "--model.eval_bits: a value is missing"),
        (["fit", "/dev/null"], "/dev/null is a device or socket, not a regular file"),
        (["outliers", "outliers", "--bits", "2,-3"], "outliers: --bits -3: numbers above 0 and at most 8"),
        (["outliers", "outliers", "--share", "nan"], "outliers: --share: 'nan'; a number above 0 and at most 1"),
        (["compare", "budgets", "--seeds=a"], "seeds: ['a']; a list of whole numbers is expected"),
        (["compare", "budgets", "--bits=nan"], "bits: ['nan']; a list of numbers is expected"),
        (["compare", "budgets", "--workers", "0"], "workers: 0; a number of at least 1"),
        (["compare", "budgets", "--folder", ""], "compare: --folder: '' is no name that a folder can have"),
        (["generate", "run", "--prompt", "x", "--bits", "nan"], "--bits: 'nan'; a number above 0"),
        (["generate", "run", "--prompt", "x", "--bits", "1e400"], "--bits: '1e400'; a number above 0"),
        (
            ["generate", "run", "--prompt", "x", "--max-new-tokens", "-1"],
            "--max-new-tokens: '-1'; a whole number from 1",
        ),
        (["generate", "run", "--prompt", "x", "--max-new-tokens", "9" * 5000], "a whole number from 1 to 1,000,000"),
        (["generate", "run", "--prompt", "x", "--temperature", "nan"], "--temperature: 'nan'; a number of at least 0"),
        (["generate", "run", "--prompt", "x", "--temperature", "-1"], "--temperature: '-1'; a number of at least 0"),
        (["generate", "run", "--prompt", "x", "--temperature", "1e-320"], "0, or a number of at least 0.001"),
        (["generate", "run", "--prompt", "x", "--seed", "-1"], "--seed: '-1'; a whole number from 0"),
        (["generate", "run", "--max-bits", "-1"], "--max-bits: '-1'; a whole number from 1 to 8"),
        (["evaluate", "run", "--limit", "-1"], "--limit: '-1'; a whole number from 1"),
        (["evaluate", "run", "--batch-size", "0"], "--batch-size: '0'; a whole number from 1"),
        (["evaluate", "run", "--num-fewshot", "-1"], "--num-fewshot: '-1'; a whole number from 0"),
        (["evaluate", "run", "--tasks", "a", "--bits", "nan"], "evaluate: --bits nan: numbers above 0 and at most 8"),
        (["evaluate", "run", "--tasks", "a", "--bits", ","], "evaluate: --bits is empty"),
        (["export", "run", "--to", "a", "--max-bits", "9"], "--max-bits: '9'; a whole number from 1 to 8"),
        (["export", "run", "--to", "x" * 300], "is no name that a folder can have"),
        (["latency", "--minutes", "nan"], "--minutes: 'nan'; a number above 0"),
        (["latency", "--shapes", "foo"], "latency: --shapes: no shape 'foo'"),
        (["latency", "--shapes", "999999x999999"], "999,998,000,001 weights; at most"),
        (["latency", "--shapes", "9" * 5000 + "x1"], "latency: --shapes: no shape '999"),
        (["latency", "--sections", "foo"], "latency: --sections: no section 'foo'"),
        (["inspect", ""], "the run is empty; give a run folder"),
        (["validate", "recipes/tinny.yaml"], "Did you mean"),
        (["compare", "budgetz"], "Did you mean"),
        (["compare", "budgets", "--seed", "0"], "compare: --seed: no such option. Did you mean 'seeds'"),
        (["compare", "budgets", "stray"], "compare: stray: no such option"),
    ],
)
def test_what_is_wrong_is_answered_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("nowhere", "nowhere holds no elastic checkpoint"),
        ("/tmp/nowhere/at/all", "holds no elastic checkpoint"),
        ("a\nb", "'a\\nb' is no name that a run folder"),
        ("x" * 5000, "is no name that a run folder"),
        (__file__, "holds no elastic checkpoint"),
    ],
)
@pytest.mark.parametrize(
    "command", [["inspect"], ["verify"], ["generate", "--prompt", "--dashed"], ["export", "--to", "to"], ["latency"]]
)
def test_a_run_that_is_not_there_is_answered_in_a_line(
    command: list[str], run: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command[0], run, *command[1:]]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_the_nearest_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny" / "elastic").mkdir(parents=True)
    (tmp_path / "tiny" / "elastic" / "config.json").write_text("{}")
    assert main(["inspect", str(tmp_path / "tini")]) == 1
    assert f"Did you mean '{tmp_path / 'tiny'}'" in capsys.readouterr().err


def test_a_value_may_begin_with_dashes_but_no_option_is_taken_for_one() -> None:
    command = COMMANDS["generate"]
    given = command.parse(command.parser(), ["run", "--prompt", "--- a title", "--bits", "3"])
    assert (given.prompt, given.bits) == ("--- a title", 3.0)
    assert command.parse(command.parser(), ["run", "--prompt=--bits"]).prompt == "--bits"
    with pytest.raises(RecipeError, match="--prompt: a value is missing"):
        command.parse(command.parser(), ["run", "--prompt", "--bits", "3"])


def test_what_a_command_cannot_do_is_said_before_heavy_imports() -> None:
    code = (
        "import sys; from mobiq_lightning.cli import main;"
        "wrong = [['inspect', ''], ['verify', 'nowhere'], ['generate', 'x', '--prompt', 'a', '--bits', 'nan'], ['fit', 'nope'],"
        "['evaluate', 'x', '--limit', '-1'], ['latency', '--shapes', 'foo'], ['export', 'nowhere', '--to', 'x'], ['fit', '.'],"
        "['validate', 'nope'], ['fit', 'tiny', 'extra'], ['compare', 'budgets', '--seeds=a'], ['outliers', 'x', '--share', '2']];"
        "codes = [main(arguments) for arguments in wrong]; assert 0 not in codes, codes;"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'jsonargparse', 'matplotlib'} & {*sys.modules};"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_typos_of_every_kind_and_all_helps_load_no_torch() -> None:
    code = (
        "import sys; from mobiq_lightning.cli import main; from mobiq_lightning.commands import COMMANDS;"
        "assert [main([name, '--help']) for name in COMMANDS] == [0] * len(COMMANDS);"
        "assert [main([name, 'x', '--tpyo', '1']) for name in COMMANDS] == [2] * len(COMMANDS);"
        "assert main(['recipes', 'ls']) == 0;"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'jsonargparse', 'matplotlib'} & {*sys.modules};"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_options_are_the_same_with_dashes_and_underscores() -> None:
    parser = Parser("program")
    parser.add_argument("--max-bits")
    given = ["--max_bits", "4", "--max_bits=4", "--model.max_bits=4", "--prompt", "a_b"]
    assert normalized(parser.options, given) == [
        "--max-bits",
        "4",
        "--max-bits=4",
        "--model.max_bits=4",
        "--prompt",
        "a_b",
    ]


def test_numbers_are_separated_by_commas() -> None:
    assert number_list("c", "--bits", "2, 2.5,3", float) == [2.0, 2.5, 3.0]
    assert number_list("c", "--bits", "[2, 3]", int) == [2, 3]
    with pytest.raises(RecipeError, match=r"c: --bits 2,x: give whole bits separated by commas, as in --bits 2,3,4"):
        number_list("c", "--bits", "2,x", int)


def test_keys_of_the_recipe_are_told_apart_from_options_of_the_command() -> None:
    command = COMMANDS["outliers"]
    keys = ["--config", "a.yaml", "--model.rates.ranges", "-1", "--data.source=x"]
    given = command.parse(command.parser(), [*keys[:3], "-1", "--bits", "2,4", keys[4], "--share=0.2", "--overwrite"])
    assert given.keys == keys
    assert (given.bits, given.share, given.overwrite) == ("2,4", 0.2, True)
    grid = COMMANDS["compare"]
    given = grid.parse(grid.parser(), ["budgets", "--seeds", "0,1", "--model.rates.ranges", "0.5", "--workers=auto"])
    assert (given.config, given.keys, given.seeds, given.workers) == (
        "budgets",
        {"model.rates.ranges": 0.5},
        "0,1",
        "auto",
    )


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ("/somewhere/bin/mobiq-lightning", "mobiq-lightning"),
        ("C/mobiq-lightning.exe", "mobiq-lightning"),
        ("/somewhere/mobiq_lightning/__main__.py", "python -m mobiq_lightning"),
        ("ipykernel_launcher.py", "python -m mobiq_lightning"),
    ],
)
def test_the_program_is_called_as_it_was_started(argv: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [argv])
    assert program() == name


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(self: object, given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(COMMANDS["verify"]), "run", interrupted)
    assert main(["verify", "run"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_output_that_nobody_reads_any_more_ends_the_command_without_a_traceback() -> None:
    command = [sys.executable, "-m", "mobiq_lightning", "recipes", "ls"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated (SIGTERM) before anything was begun")],
)
def test_a_signal_while_the_package_is_imported_is_answered_in_a_line(number: int, code: int, said: str) -> None:
    script = (
        "import importlib.abc, os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which shells turn off in the background
        "class Slow(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == 'mobiq_lightning.cli': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Slow())\n"
        "from mobiq_lightning.__main__ import run\n"
        "sys.exit(run())\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (code, f"{said}\n")
