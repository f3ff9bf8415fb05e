"""The README from top to bottom: its commands and its Python, in a folder of their own, on a model of two blocks.

A calibration of the built-in model takes minutes, so arguments are appended to some commands; `APPENDED` lists all of
them. Nothing else of a command is changed.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from mobiq_lightning.cli import main

ROOT = Path(__file__).parents[1]
SMALL = [
    "--model.slices.init_args.group_size=16",
    "--model.stages=[{depth: 2, train: [codes, ranges], epochs: 1}, {train: [routers], epochs: 1, scope: model}]",
    "--model.eval_bits=[2, 2.5, 8]",
    "--model.random_seeds=[0]",
    "--data.n_samples=8",
    "--data.n_generated=0",
    "--data.seq_len=32",
    "--data.eval_seq_len=64",
    "--data.eval_max_windows=8",
    "--trainer.accelerator=cpu",
]
FILES = ["--model.pretrained=path/to/model", "--data.source=calib.txt", "--data.eval_source=eval.txt"]
APPENDED = {
    "fit --config recipes/tiny.yaml": [*FILES, *SMALL],
    "fit --config recipes/tiny.yaml --model.pretrained path/to/model --data.source calib.txt --data.eval_source eval.txt"
    " --trainer.default_root_dir runs/mine": SMALL,
}
"""What is appended to commands, by the command as the README has it."""
NOT_RUN = {
    'pip install -e ".[test]"': "the set-up of these tests themselves; `test_documentation` compares it with .ci/run",
    "python -m pytest": "these tests",
}
"""Commands that are not run, each with the reason."""
PROGRAM = "python -m mobiq_lightning "


def blocks_of(page: Path) -> Iterator[tuple[str, str]]:
    """Code blocks of a page: the language, empty for commands, and the text."""
    parts = page.read_text(encoding="utf-8").split("```")
    for block in parts[1::2]:
        language, _, text = block.partition("\n")
        yield language, text


def commands_of(text: str) -> Iterator[str]:
    """Commands of a block, without comments and with the spaces that the shell sees."""
    for line in text.replace("\\\n", " ").splitlines():
        for command in line.split("  #")[0].split(" && "):
            yield " ".join(command.split())


@pytest.fixture
def fresh_folder(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with the recipes and with the files that the README calls the reader's own."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copytree(make_model(), tmp_path / "path" / "to" / "model")
    for name in ("calib.txt", "eval.txt"):
        shutil.copy(text_file, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_runs_from_top_to_bottom(fresh_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    appended, languages = dict(APPENDED), []
    for language, text in blocks_of(ROOT / "README.md"):
        languages.append(language)
        if language == "python":
            exec(compile(text, "README.md", "exec"), {})
            assert "code_bits" in capsys.readouterr().out
            continue
        for command in commands_of(text):
            if command in NOT_RUN:
                continue
            assert command.startswith(PROGRAM), f"{command}: neither run nor listed as not run"
            given = command.removeprefix(PROGRAM)
            assert main([*shlex.split(given), *appended.pop(given, [])]) == 0, command
    assert not appended, f"the README has no such command any more: {list(appended)}"
    assert languages.count("python") == 1
    for run in ("tiny", "mine"):
        assert (fresh_folder / "runs" / run / "elastic" / "config.json").is_file()
        recipe = yaml.safe_load((fresh_folder / "runs" / run / "config.yaml").read_text(encoding="utf-8"))
        assert recipe["model"]["pretrained"] == str(fresh_folder / "path/to/model")
        assert recipe["trainer"]["default_root_dir"] == f"runs/{run}"
    # The page of the checkpoint shows more of the same model.
    block = next(text for language, text in blocks_of(ROOT / "docs" / "checkpoint.md") if language == "python")
    exec(compile(block, "docs/checkpoint.md", "exec"), {})
    assert "[2.0, 4.0, 8.0]" in capsys.readouterr().out
    # The page of the functions; the recipe of the small run stands for the shipped one that it names.
    block = next(text for language, text in blocks_of(ROOT / "docs" / "python.md") if language == "python")
    assert block.count('"tiny"') == 1
    exec(compile(block.replace('"tiny"', '"runs/tiny/config.yaml"'), "docs/python.md", "exec"), {})
    recipe = yaml.safe_load((fresh_folder / "runs" / "linear" / "config.yaml").read_text(encoding="utf-8"))
    assert recipe["model"]["router"]["class_path"].endswith("LinearRouter")
