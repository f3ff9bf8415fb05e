"""The readers of the package that are given mutants of valid files: by the suite a few hundred, by `benchmarks/fuzz.py` many."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from mobiq_lightning.comparison.cell import CellFigures
from mobiq_lightning.comparison.folder import ComparisonFolder
from mobiq_lightning.comparison.grid import Grid, read_grid
from mobiq_lightning.comparison.report import ReportCell, ReportInput, write_report
from mobiq_lightning.comparison.report.runs import read_journal, read_strategies
from mobiq_lightning.comparison.report.tables import measured_points
from mobiq_lightning.comparison.table import INTERPOLATION, CellRow, long_table, points_of
from mobiq_lightning.comparison.verdicts import all_in_verdicts, verdicts
from mobiq_lightning.evaluation import print_harness, print_table, read_gains
from mobiq_lightning.evaluation.report import plot
from mobiq_lightning.jobs.recipe import check_arguments
from mobiq_lightning.latency import print_budgets
from mobiq_lightning.runs import read_diagnostics, read_results
from mobiq_lightning.serving import BitsPolicy
from mobiq_lightning.serving.policy import CurvePoint
from tests.fuzzing import as_json, as_yaml, mutants, mutate

ROOT = Path(__file__).parents[1]
BITS = [2.0, 2.5, 3.0, 4.0]


@dataclass(frozen=True)
class Reader:
    """Something that reads a file.

    Args:
        name: What it is called in tables.
        folder: Folder with valid files.
        file: The file in it that is mutated.
        read: Reads the folder: it ends with a `MobiqError` or not at all.
        parse: Makes a value of the file's text; without it only bytes are mutated.
        write: Makes a text of such a value.
        cost: How many times as long one reading takes as that of a recipe; fewer mutants are tried.
        seconds: How long one reading may take; drawing a report takes several.
    """

    name: str
    folder: Path
    file: str
    read: Callable[[Path], object]
    parse: Callable[[str], Any] | None = json.loads
    write: Callable[[Any], str] = as_json
    cost: int = 1
    seconds: float = 5.0

    def inputs(self, random: Random, count: int) -> Iterator[bytes]:
        """Mutants of the file."""
        content = (self.folder / self.file).read_bytes()
        if self.parse is None:
            yield from (mutate(content, random) for _ in range(count))
        else:
            yield from mutants(content, random, count, self.parse, self.write)


def sample_run(folder: Path) -> Path:
    """Writes what a finished run leaves of figures, small and valid: results, diagnostics, journal, gains and cell.json."""
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / "results" / "tiny.json", folder / "results.json")
    results = json.loads((folder / "results.json").read_text())
    kept = [row for row in results["rows"] if row["allocation"] in ("full", "rtn", "router", "static", "random")]
    guard = {"guard": "collapsed_router", "block": 0, "input": "q_proj", "action": "repair", "epoch": 1, "depth": 3.0}
    entry = {
        "task": "cloze",
        "metric": "acc",
        "value": 0.5,
        "stderr": 0.1,
        "n_examples": 6,
        "num_fewshot": 0,
        "limit": None,
    }
    entry |= {"lm_eval": "0.4", "environment": {"python": "3.11"}, "bits": 3, "used_bits": 3.0, "all_in_bits": 3.5}
    speed = {"target_bits": 2.0, "used_bits": 2.0, "us": 3.0, "gb_per_s": 4.0, "of_copy": 0.5, "times_plain": 1.5}
    speed |= {"tokens_per_second": None}
    results |= {"rows": kept, "guards": [{**guard, "value": 0.99, "limit": 0.9}], "lm_eval": [entry]}
    results |= {"latency": {"device": "cpu", "what": "w", "plain": "float32", "budgets": [speed]}}
    (folder / "results.json").write_text(json.dumps(results))
    inputs = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    use = [{"class": "0", "tokens": 10, "bits": 2.5}, {"class": "4-7", "tokens": 30, "bits": 3.0}]
    budgets = [
        {"target_bits": b, "mean_bits": [b, b], "depth_share": [[0.5, 0.25, 0.25], [0.6, 0.2, 0.2]], "by_position": use,
         "by_frequency": use}
        for b in (2.0, 3.0)
    ]  # fmt: skip
    error = {"tokens": 64, "relative_error": [[0.5, 0.1, 0.01], [0.4, 0.2, 0.02]]}
    diagnostics = {"inputs": [{"name": n, "weights": 64} for n in inputs], "depths": [2, 3, 4], "budgets": budgets}
    (folder / "diagnostics.json").write_text(json.dumps({**diagnostics, "block_error": error}))
    lines = [
        {"time": 1.0, "step": step, f"block/loss{kind}": 0.5, f"block/target_bits{kind}": 3.0, f"block/index{kind}": 0.0,
         f"block/routed_bits{kind}": 2.9}
        for step in range(3) for kind in ("_epoch", "_step")
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gains = [
        {"input": name, "weights": 64, "slice": s, "bits": 1, "probes": 0.1, "token_std": 0.1, "first_token": 0.2,
         "norm_rank": 0.3, "router_rank": 0.4}
        for name in inputs for s in (2, 3)
    ]  # fmt: skip
    found = {"windows": 2, "seq_len": 16, "reference_bits": 3, "unit": "nats per token", "rows": gains}
    (folder / "layer_gains.json").write_text(json.dumps(found))
    (folder / "cell.json").write_text(json.dumps({"seconds": 1.5, "peak_memory_gb": 0.5, "resumed": False}))
    return folder


def readers(folder: Path) -> list[Reader]:
    """All readers, with valid files written into a new folder."""
    run = sample_run(folder / "run")
    shutil.copy(ROOT / "recipes" / "tiny.yaml", folder / "recipe.yaml")
    small = {
        "name": "small", "recipe": "tiny-ranges", "seeds": [0, 1], "bits": [2, 3], "workers": 2, "title": "Small",
        "folder": "out", "changes": {"model.eval_bits": [2, 3, 4]}, "wandb": {"project": "p", "offline": True},
        "strategies": {"mlp": {}, "constant": {"model.budget": {"class_path": "ConstantBudget", "init_args": {"bits": 3.0}}}},
    }  # fmt: skip
    (folder / "grid.yaml").write_text(yaml.safe_dump(small, sort_keys=False))
    grid = read_grid(str(folder / "grid.yaml"))
    claimed = folder / "claimed"
    ComparisonFolder(claimed).claim(grid, grid.cells(), overwrite=False)

    def drawn(name: str, parse: Callable[[str], Any] | None) -> Reader:
        return Reader(f"drawn report, {name}", run, name, _drawn_report, parse, cost=300, seconds=60)

    return [
        Reader(
            "recipe", folder, "recipe.yaml", lambda f: check_arguments(["--config", str(f / "recipe.yaml")]),
            yaml.safe_load, as_yaml,
        ),
        Reader("grid", folder, "grid.yaml", lambda f: read_grid(str(f / "grid.yaml")).cells(), yaml.safe_load, as_yaml),
        Reader("results.json", run, "results.json", _show_results),
        Reader("results.json, plot", run, "results.json", _plot_results, cost=10),
        Reader("results.json, policy", run, "results.json", _choose_bits),
        Reader("diagnostics.json", run, "diagnostics.json", lambda f: read_diagnostics(f / "diagnostics.json")),
        Reader("metrics.jsonl", run, "metrics.jsonl", lambda f: read_journal(f / "metrics.jsonl"), None),
        Reader("layer_gains.json", run, "layer_gains.json", _read_gains),
        Reader("cell.json", run, "cell.json", _read_cell),
        Reader("comparison.json", claimed, "comparison.json", lambda f: _claim(f, grid)),
        *(Reader(f"report, {n}", run, n, _report, cost=2) for n in ("results.json", "cell.json")),
        Reader("report, diagnostics.json", run, "diagnostics.json", _read_cells),
        Reader("report, metrics.jsonl", run, "metrics.jsonl", _read_cells, None),
        *(drawn(name, json.loads) for name in ("results.json", "diagnostics.json")),
        drawn("metrics.jsonl", None),
    ]  # fmt: skip


def _quiet(show: Callable[[], object]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        show()


def _show_results(folder: Path) -> None:
    found = read_results(folder / "results.json")
    if found.measured is not None:
        _quiet(lambda: print_table(found.measured))  # type: ignore[arg-type]
    if found.lm_eval:
        _quiet(lambda: print_harness(found.lm_eval))  # type: ignore[arg-type]
    if found.latency:
        _quiet(lambda: print_budgets(found.latency))  # type: ignore[arg-type]
    json.dumps(found.to_json())


def _plot_results(folder: Path) -> None:
    measured = read_results(folder / "results.json").measured
    if measured is not None:
        plot(measured).savefig(io.BytesIO(), format="png")


def _choose_bits(folder: Path) -> None:
    measured = read_results(folder / "results.json").measured
    rows = measured.rows if measured is not None else ()
    policy = BitsPolicy([CurvePoint(r.target_bits, r.perplexity, 1.0) for r in rows if r.allocation == "router"])
    policy.bits_for_queue(3)
    policy.bits_for_speed(0.5)


def _read_gains(folder: Path) -> None:
    read_gains(
        folder / "layer_gains.json", ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"], (2, 1, 1)
    )


def _read_cell(folder: Path) -> CellFigures:
    return ComparisonFolder(folder).figures(_cell(folder))


def _cell(folder: Path) -> Any:
    return type("Cell", (), {"folder": folder, "name": "a, seed 0", "slug": "a-seed-0", "strategy": "a", "seed": 0})


def _claim(folder: Path, grid: Grid) -> None:
    ComparisonFolder(folder).claim(Grid(**{**asdict(grid), "folder": str(folder)}), grid.cells(), overwrite=False)


def _input(folder: Path) -> ReportInput:
    """What a report is made of: the run, and two of the same strategies that are whole."""
    comparison = ComparisonFolder(folder)
    measured, figures = comparison.measured(_cell(folder)), comparison.figures(_cell(folder))
    rows = [CellRow(name, seed, row) for name in ("a", "b") for seed in (0, 1) for row in measured.rows]
    points = points_of(rows, BITS)
    said = verdicts(points, ["a", "b"], BITS, 2) + all_in_verdicts(rows, ["a", "b"], BITS)
    cells = [ReportCell(name, seed, folder, {}, "finished", **vars(figures)) for name in ("a", "b") for seed in (0, 1)]
    return ReportInput(
        "T", "c", said, measured.model, measured.protocol, measured.environment, cells, long_table(points), INTERPOLATION
    )  # fmt: skip


def _report(folder: Path) -> None:
    strategies, _ = read_strategies(_input(folder).cells)
    measured_points(strategies)


def _read_cells(folder: Path) -> None:
    cells = [ReportCell(name, seed, folder, {}, "finished") for name in ("a", "b") for seed in (0, 1)]
    read_strategies(cells)


def _drawn_report(folder: Path) -> None:
    write_report(folder, _input(folder))
