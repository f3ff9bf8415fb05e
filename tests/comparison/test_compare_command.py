"""The comparison as a user runs it: cells in processes of their own, killed, resumed, one failing, and what is left."""

from __future__ import annotations

import csv
import html
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mobiq_lightning.cli import main
from mobiq_lightning.runs import CONTROLS
from tests.conftest import small_recipe
from tests.processes import forked_cells

ROOT = Path(__file__).parents[2]


@dataclass
class Compared:
    """A comparison that was killed once, resumed, and had one failing strategy."""

    folder: Path
    arguments: list[str]
    code: int
    printed: str
    said: str
    kept: dict[Path, int]  # results.json of the cells that were finished when it was killed, with their times
    orphans: list[str]  # its cells that were still running some time after


def keys_of(arguments: list[str]) -> dict[str, Any]:
    """``--a.b=c`` arguments as a mapping."""
    pairs = [argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument]
    return {key: yaml.safe_load(value) for key, value in pairs if key != "trainer.default_root_dir"}


def running_cells(folder: Path) -> list[str]:
    """Command lines of the processes that run cells of a comparison."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        found += [line] if "comparison.cell" in line and str(folder) in line else []
    return found


@pytest.fixture(scope="session")
def compared(make_model: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """A comparison of two strategies and one that fails, with two seeds, killed after its first cell."""
    folder = tmp_path_factory.mktemp("compared")
    grid = {
        "name": "small",
        "recipe": str(ROOT / "recipes" / "tiny-ranges.yaml"),
        "folder": str(folder / "out"),
        "seeds": [0, 1],
        "bits": [2, 2.5, 3],
        "workers": 2,
        "wandb": {"project": "tests", "offline": True},
        "changes": {
            **keys_of(small_recipe(make_model(), text_file, folder, timed=True)),
            "model.eval_bits": [2, 2.5, 3, 4],
        },
        "strategies": {
            "sampled": {},
            "greedy": {"data.n_samples": 100_000},  # more than the text has
            "constant": {"model.budget": {"class_path": "ConstantBudget", "init_args": {"bits": 3.0}}},
        },
    }
    del grid["changes"]["model.random_seeds"]  # type: ignore[attr-defined]
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    arguments = ["--config", str(path)]
    kept, orphans = kill_after_first_cell(folder / "out", arguments)
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as said, forked_cells():
        code = main(["compare", *arguments])
    return Compared(folder / "out", arguments, code, printed.getvalue(), said.getvalue(), kept, orphans)


def kill_after_first_cell(out: Path, arguments: list[str]) -> tuple[dict[Path, int], list[str]]:
    """Starts a comparison of one cell at a time and kills it, not its cells, while the second one runs."""
    command = [sys.executable, "-m", "mobiq_lightning", "compare", *arguments, "--workers=1"]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 240
    while not any("greedy-seed-0" in line for line in running_cells(out)):
        assert process.poll() is None, "it ended before its second cell"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while running_cells(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    kept = {path.parent / "results.json" for path in out.glob("cells/*/cell.json")}
    return {path: path.stat().st_mtime_ns for path in kept}, running_cells(out)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends a process with its parent")
def test_a_killed_comparison_leaves_no_cell_running(compared: Compared) -> None:
    assert compared.orphans == []


def test_the_same_command_keeps_finished_cells_and_runs_the_rest(compared: Compared) -> None:
    assert compared.kept
    assert {path: path.stat().st_mtime_ns for path in compared.kept} == compared.kept
    finished = {(row["strategy"], row["cell_seed"]) for row in rows_of(compared.folder) if row["status"] == "finished"}
    assert finished == {(strategy, seed) for strategy in ("sampled", "constant") for seed in (0, 1)}
    assert f"{len(compared.kept)} finished, 2 at a time" in compared.said
    assert "finished in" in compared.said


def test_a_cell_that_fails_is_in_the_table_with_its_reason_and_the_others_go_on(compared: Compared) -> None:
    assert compared.code == 1
    failed = [row for row in rows_of(compared.folder) if row["status"] == "failed"]
    assert [(row["strategy"], row["cell_seed"]) for row in failed] == [("greedy", 0), ("greedy", 1)]
    assert "data.n_samples asks for 100000" in failed[0]["reason"]
    assert "greedy, seed 0 failed: data.source" in compared.printed.replace("\n", " ")
    assert "2 of 6 cells failed: greedy, seed 0; greedy, seed 1" in compared.said
    assert "FAILED" in compared.said


def test_every_strategy_stands_beside_full_precision_rounding_and_all_controls(compared: Compared) -> None:
    with (compared.folder / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    for strategy in ("sampled", "constant"):
        found = {(row["allocation"], row["used_bits"]) for row in table if row["strategy"] == strategy}
        assert {("full", "32.0"), ("rtn", "2"), ("rtn", "3")} <= found
        assert {(a, b) for a in ("router", *CONTROLS) for b in ("2", "2.5", "3")} <= found
    assert {row["n"] for row in table} == {"2"}
    assert all(row["perplexity_spread"] for row in table)


def test_the_report_lies_beside_the_tables_with_verdicts_and_failures(compared: Compared) -> None:
    page = (compared.folder / "report.html").read_text(encoding="utf-8")
    summary = json.loads((compared.folder / "table.json").read_text())
    assert all(html.escape(sentence).replace("&#x27;", "&#39;") in page for sentence in summary["verdicts"])
    assert "2 of 6 runs failed" in page
    assert (compared.folder / "pareto-perplexity.png").is_file()
    assert f"The report is {compared.folder / 'report.html'}." in compared.said


def test_cells_share_tokens_and_the_rows_that_no_strategy_changes(compared: Compared) -> None:
    assert len(list((compared.folder / "shared").glob("tokens-*.safetensors"))) == 2
    assert len(list((compared.folder / "shared").glob("rows-*.json"))) == 1
    rounded = [row for row in rows_of(compared.folder) if row.get("allocation") == "rtn"]
    assert len({row["perplexity"] for row in rounded if row["target_bits"] == 3}) == 1
    assert len(rounded) == 4 * 5


def test_a_cell_says_how_long_it_took_and_how_much_memory(compared: Compared) -> None:
    cells = json.loads((compared.folder / "table.json").read_text())["cells"]
    done = [cell for cell in cells if cell["status"] == "finished"]
    assert len(done) == 4
    assert all(cell["seconds"] > 0 and cell["peak_memory_gb"] > 0.1 for cell in done)


def test_the_recipe_of_a_cell_runs_alone(compared: Compared, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = compared.folder / "recipes" / "constant-seed-1.yaml"
    assert recipe.read_text().startswith("# python -m mobiq_lightning fit --config ")
    assert main(["fit", "--config", str(recipe)]) == 0
    assert "holds this run, finished" in capsys.readouterr().err


def test_a_changed_grid_is_refused_with_what_has_changed(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = yaml.safe_load(Path(compared.arguments[1]).read_text())
    grid["strategies"]["constant"]["model.budget"]["init_args"]["bits"] = 2.5
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    assert main(["compare", "--config", str(path)]) == 1
    said = capsys.readouterr().err
    assert "constant, seed 0: model.budget.init_args.bits: 3.0 -> 2.5" in said
    assert "--overwrite" in said


def test_a_finished_comparison_is_shown_again_without_running_and_leaves_out_what_the_grid_lost(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(compared.folder, tmp_path / "out")
    stored = json.loads((copy / "comparison.json").read_text())
    grid = yaml.safe_load(Path(compared.arguments[1]).read_text())
    del grid["strategies"]["greedy"]
    grid["wandb"], grid["folder"] = None, str(copy)
    for cell in stored["cells"].values():  # the copy's own folders
        cell["trainer"].pop("logger", None)
    (copy / "comparison.json").write_text(json.dumps(stored))
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    assert main(["compare", "--config", str(path)]) == 0
    printed = capsys.readouterr()
    assert "4 cells (2 strategies x 2 seeds), 4 finished" in printed.err
    assert "greedy-seed-0, greedy-seed-1, which the grid does not name" in printed.err
    assert "random tokens" in printed.out


def records(path: Path) -> Iterator[bytes]:
    """Records of a ``.wandb`` file: the log format of LevelDB (blocks of 32 KiB; CRC, length and kind before each part)
    after a header of 7 bytes.
    """
    content, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # no room for another head in this block
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a record in one part, or its last part
            yield whole
            whole = b""


def read_offline_run(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings of an offline W&B run, and what it has logged."""
    from wandb.proto import wandb_internal_pb2

    settings: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    for data in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            config = {u.key or ".".join(u.nested_key): json.loads(u.value_json) for u in record.run.config.update}
            run = record.run
            settings |= {"group": run.run_group, "job_type": run.job_type, "name": run.display_name, "config": config}
        elif record.HasField("history"):
            history.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return settings, history


class TestWandb:
    def test_a_cell_is_a_run_of_the_group_with_the_recipe_as_config_and_its_figures(self, compared: Compared) -> None:
        cell = compared.folder / "cells" / "constant-seed-0"
        files = sorted(cell.glob("wandb/offline-run-*/run-*.wandb"))
        settings, history = read_offline_run(files[-1])
        assert (settings["group"], settings["job_type"]) == ("small", "calibrate")
        assert settings["name"] == "constant-seed-0"
        assert settings["config"]["model"]["budget"]["class_path"].endswith("ConstantBudget")
        logged = {(line["eval/bits"], line["eval/ppl"]) for line in history if "eval/ppl" in line}
        rows = json.loads((cell / "results.json").read_text())["rows"]
        assert logged == {(r["used_bits"], r["perplexity"]) for r in rows if r["allocation"] == "router"}
        assert any("eval/kl_at_2.5_bits" in line for line in history)

    def test_the_comparison_is_a_run_of_its_own_with_the_long_table(self, compared: Compared) -> None:
        files = sorted(compared.folder.glob("wandb/offline-run-*/run-*.wandb"))
        settings, history = read_offline_run(files[-1])
        assert (settings["group"], settings["job_type"], settings["name"]) == ("small", "compare", "small")
        assert settings["config"]["grid"]["strategies"]["constant"]
        table = json.loads((compared.folder / "table.json").read_text())["table"]
        assert any(line.get("comparison.nrows") == len(table) for line in history)
        (stored,) = files[-1].parent.glob("files/media/table/comparison_*.table.json")
        logged = json.loads(stored.read_text())
        perplexity = logged["columns"].index("perplexity_mean")
        assert [row[perplexity] for row in logged["data"]] == [row["perplexity_mean"] for row in table]


def test_the_sweep_runs_the_real_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from mobiq_lightning.jobs import ElasticCLI
    from mobiq_lightning.jobs.arguments import with_recipe
    from mobiq_lightning.jobs.quiet import quiet_libraries

    sweep = yaml.safe_load((ROOT / "recipes" / "sweeps" / "budgets.yaml").read_text())
    assert sweep["metric"]["name"] == "eval/kl_at_3_bits"
    fixed = [part for part in sweep["command"] if not part.startswith("${")]
    assert fixed[:4] == ["python", "-m", "mobiq_lightning", "fit"]
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    names = []
    for value in sweep["parameters"]["model.budget"]["values"]:
        arguments = [part for part in fixed[4:] if not part.startswith("--trainer.logger")]
        changed = ["--seed_everything=1", "--trainer.accelerator=cpu", f"--model.budget={value}"]
        with quiet_libraries():
            cli = ElasticCLI("build", with_recipe([*arguments, *changed]))
        names.append(type(cli.model.budget).__name__)
        assert cli.trainer.default_root_dir == "runs/sweep/abc"
    assert len(set(names)) == 6
