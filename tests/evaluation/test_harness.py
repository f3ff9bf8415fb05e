"""Tasks of lm-evaluation-harness, offline, on a local task file."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mobiq_lightning.cli import main
from mobiq_lightning.errors import BitsError
from mobiq_lightning.evaluation.harness import _Runner
from mobiq_lightning.runs import HarnessEntry
from mobiq_lightning.runtime.elastic_model import ElasticModel
from tests.conftest import Run

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")  # the harness's own


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which of two words goes on."""
    folder = tmp_path_factory.mktemp("task")
    rows = [{"text": f"import {n}", "choices": [" sys", " as"], "label": n % 2} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {
        "task": "local_cloze",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path = folder / "local_cloze.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.fixture(scope="module")
def broken_tasks(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    (folder / "none.yaml").write_text("- task")
    (folder / "broken.yaml").write_text("task: [")
    spec = {**yaml.safe_load(task.read_text()), "task": "failing", "doc_to_text": "{{nothing.of.that}}"}
    (folder / "failing.yaml").write_text(yaml.safe_dump(spec))
    return folder


def test_results_are_appended_beside_what_was_there(
    finished: Run, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished[0], tmp_path / "run")
    source = yaml.safe_load((run / "config.yaml").read_text())["model"]["pretrained"]
    before, numbers = json.loads((run / "results.json").read_text()), random.getstate()
    seed = torch.get_rng_state()
    assert main(["evaluate", str(run), "--tasks", str(task), "--bits", "2,8", "--source", source]) == 0
    assert (
        main(["evaluate", str(run), "--tasks", "local_cloze", "--bits", "3", "--include-path", str(task.parent)]) == 0
    )
    assert random.getstate() == numbers
    assert torch.equal(torch.get_rng_state(), seed)
    after = json.loads((run / "results.json").read_text())
    assert {key: after[key] for key in before} == before
    entries = after["lm_eval"]
    assert [(e["task"], e["metric"], e["bits"], e["n_examples"]) for e in entries] == [
        ("local_cloze", "acc", bits, 6) for bits in (2.0, 8.0, "full", 3.0)
    ]
    assert [entries[0]["used_bits"], entries[1]["used_bits"], entries[2]["used_bits"]] == [2.0, 8.0, None]
    assert entries[1]["value"] == entries[2]["value"]  # 8 bits choose as full precision does
    assert json.loads((run / "elastic" / "results.json").read_text())["lm_eval"] == entries
    assert "| local_cloze | acc | full |" in (run / "elastic" / "README.md").read_text()
    assert "local_cloze" in capsys.readouterr().out
    assert main(["inspect", str(run)]) == 0
    assert "local_cloze" in capsys.readouterr().out
    assert main(["validate", "--config", str(run / "config.yaml"), f"--trainer.default_root_dir={run}"]) == 0
    assert json.loads((run / "results.json").read_text())["lm_eval"] == entries


def test_scores_are_kept_where_nothing_was_counted(
    finished: Run, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(model: Any) -> None:
        raise BitsError("no tokens were read")

    monkeypatch.setattr(ElasticModel, "bits_used", nothing)
    folder = shutil.copytree(finished[0] / "elastic", tmp_path / "elastic")
    assert main(["evaluate", str(folder), "--tasks", str(task), "--bits", "3"]) == 0
    assert "at 3 bits are not known (no tokens were read)" in capsys.readouterr().err
    (entry,) = json.loads((folder / "results.json").read_text())["lm_eval"]
    assert (entry["task"], entry["bits"], entry["used_bits"], entry["all_in_bits"]) == ("local_cloze", 3.0, None, None)
    assert entry["task_version"] is not None


def test_rows_keep_what_tells_them_apart(make_model: Callable[..., Path]) -> None:
    runner = _Runner(["t"], None, None, None, 1, make_model())
    results = {
        "results": {
            "t": {
                "alias": "t",
                "sample_len": 4,
                "exact_match,strict": 0.25,
                "exact_match_stderr,strict": 0.1,
                "exact_match,flexible": 0.5,
                "exact_match_stderr,flexible": "N/A",
                "count,none": 1,
            }
        },
        "versions": {"t": 2.0},
        "configs": {"t": {"metadata": {"version": 2.0, "lengths": [4096]}}},
        "n-shot": {"t": 5},
        "n-samples": {"t": {"effective": 4}},
        "higher_is_better": {"t": {"exact_match": True}},
    }
    found = list(runner.entries(results, 3.0, 3.1, 3.4))
    assert [(e.metric_text, e.value, e.stderr, e.higher_is_better) for e in found] == [
        ("exact_match (strict)", 0.25, 0.1, True),
        ("exact_match (flexible)", 0.5, None, True),
        ("count", 1.0, None, None),
    ]
    for entry in found:
        assert (entry.task_version, entry.num_fewshot, entry.metadata) == ("2.0", 5, {"lengths": [4096]})
        assert HarnessEntry.from_json(json.loads(json.dumps(entry.to_json())), "results.json") == entry


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tasks", "local_clozes"], 2, "Did you mean 'local_cloze'"),
        (["--tasks", "nowhere.yaml"], 2, "there is no task file nowhere.yaml"),
        (["--tasks", "pyproject.toml/x.yaml"], 2, "there is no task file"),
        (["--tasks", "{folder}/none.yaml"], 2, "none.yaml describes no task"),
        (["--tasks", "{folder}/broken.yaml"], 2, "broken.yaml is not valid YAML"),
        (["--tasks", "{folder}/failing.yaml"], 1, "failing cannot be run (UndefinedError"),
        (["--tasks", "local_cloze", "--bits", "2,x"], 2, "give numbers separated by commas"),
        (["--tasks", "local_cloze", "--bits", "2,9"], 2, "--bits"),
        (["--tasks", "local_cloze", "--bits", "1.5"], 1, "1.5 bits asked for; this model holds 2 to 8"),
        ([], 2, "--tasks is missing"),
    ],
)
def test_what_cannot_be_evaluated_is_answered(
    finished: Run,
    task: Path,
    broken_tasks: Path,
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [argument.format(folder=broken_tasks) for argument in arguments]
    assert main(["evaluate", str(finished[0]), "--include-path", str(task.parent), *arguments]) == code
    assert message in capsys.readouterr().err


def test_without_the_harness_it_says_what_to_install(
    finished: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert main(["evaluate", str(finished[0]), "--tasks", "arc_easy"]) == 2
    assert "pip install" in capsys.readouterr().err
