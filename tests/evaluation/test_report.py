"""The table and the loggers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from mobiq_lightning.console import whole_tables
from mobiq_lightning.evaluation import print_table, write_results
from mobiq_lightning.evaluation.figure import plot
from mobiq_lightning.loggers import JsonlLogger, WandbLogger
from mobiq_lightning.runs import CalibrationText, EvalProtocol, Measured, Results, Row, summarize
from tests.runs.test_in_words import ROWS, row

PROTOCOL = EvalProtocol("packed", 128, 8, True, "t", "text", "h", 1000, CalibrationText("text", 8, 128, 0))


def measured(rows: list[Row]) -> Measured:
    return Measured("m", PROTOCOL, {}, tuple(rows))


def test_seeds_are_merged_into_mean_and_spread() -> None:
    merged = next(r for r in summarize(ROWS) if r.allocation == "random" and r.target_bits == 3)
    assert merged.perplexity == pytest.approx(12.4)
    assert merged.spread == pytest.approx(0.2828, abs=1e-3)


def test_a_comparison_without_random_seeds_is_printed_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured([r for r in ROWS if r.allocation not in ("random", "rtn")])
    write_results(Results(found), tmp_path)
    print_table(found)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert set(curves_of(plot(found))) == {"router", "static layers"}
    assert "static layers" in capsys.readouterr().out


def test_the_table_has_the_best_control_of_each_budget_or_every_row_and_the_files_hold_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured([*ROWS, row("rtn", 6, 10.1)])
    print_table(found)
    output = capsys.readouterr().out
    shown = [line.split("│")[1:3] for line in output.splitlines() if line.startswith("│")]
    assert [(name.strip(), bits.strip()) for name, bits in shown] == [
        ("full precision", "16"),
        ("round to nearest", "3"),
        ("router", "3"),
        ("best control: random tokens", "3"),
        ("router", "4"),
        ("best control: static layers", "4"),
    ]
    assert "3 more rows are in results.csv; --all shows them here." in output
    assert "12.40 ± 0.28" in output
    with whole_tables():
        print_table(found)
    output = capsys.readouterr().out
    assert output.count("│ random tokens") == 2
    assert "12.40 ± 0.28" in output
    assert "--all" not in output
    write_results(Results(measured(ROWS)), tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [list(r) for r in stored] == [
        ["allocation", "target_bits", "used_bits", "all_in_bits", "perplexity", "kl", "seed"]
    ] * len(ROWS)
    assert [Row(**r) for r in stored] == ROWS
    assert (tmp_path / "results.csv").read_text().splitlines()[:2] == [
        "allocation,target_bits,used_bits,all_in_bits,perplexity,kl,seed",
        "full,16,16,16.5,10.0,0.1,",
    ]
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def curves_of(figure: Any) -> dict[str, list[tuple[float, float, float]]]:
    """Points of every curve of a plot by its label: bits, perplexity, and half the length of the error bar."""
    (axes,) = figure.axes
    curves = {}
    for container in axes.containers:
        line, _, (bars,) = container
        halves = [(top - bottom) / 2 for (_, bottom), (_, top) in bars.get_segments()]
        points = zip(line.get_xydata().tolist(), halves, strict=True)
        curves[container.get_label()] = [(bits, perplexity, half) for (bits, perplexity), half in points]
    return curves


def test_the_plot_has_a_curve_for_each_allocation_and_a_line_for_full_precision() -> None:
    figure = plot(measured(ROWS))
    curves = curves_of(figure)
    assert {name: [bits for bits, _, _ in points] for name, points in curves.items()} == {
        "round to nearest": [3],
        "router": [3, 4],
        "static layers": [3, 4],
        "random tokens": [3, 4],
    }
    assert curves["router"] == [(3, 12.0, 0.0), (4, 11.0, 0.0)]
    assert curves["random tokens"][0] == (3, pytest.approx(12.4), pytest.approx(0.2828, abs=1e-3))
    full = next(line for line in figure.axes[0].lines if line.get_label() == "full precision")
    assert set(full.get_ydata()) == {10.0}
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_title() == "m on text, packed, window 128"


def test_the_table_says_where_all_controls_are_alike(capsys: pytest.CaptureFixture[str]) -> None:
    alike = [row("router", 2, 12.0, 0), row("static", 2, 12.0), row("random", 2, 12.0, 0)]
    print_table(measured([*alike, row("router", 3, 11.0, 0), row("static", 3, float("inf")), row("random", 3, 13, 0)]))
    output = capsys.readouterr().out
    assert "│ all controls" in output
    assert "│ best control: random tokens" in output


def test_the_axis_of_the_plot_is_chosen_for_the_router_and_what_lies_above_is_an_arrow() -> None:
    far = [row("rtn", 3, 500.0), row("static", 4, 80.0), row("layers", 4, 90.0)]
    kept = [r for r in ROWS if (r.allocation, r.target_bits) not in (("rtn", 3), ("static", 4))]
    figure = plot(measured([*kept, *far]))
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert low < 10.0 < 12.6 < high < 20
    assert {text.get_text() for text in axes.texts} == {"↑ 500", "↑ 80", "↑ 90"}
    assert "beyond the axis" in axes.get_ylabel()
    assert len({text.xyann[1] for text in axes.texts}) == 2  # of those at one budget each has a line of its own
    near = plot(measured(ROWS)).axes[0]
    assert not near.texts
    assert "beyond" not in near.get_ylabel()


def test_the_router_is_drawn_above_all_other_curves() -> None:
    (axes,) = plot(measured(ROWS)).axes
    above = {container.get_label(): container[0].get_zorder() for container in axes.containers}
    assert max(above, key=lambda name: above[name]) == "router"
    assert sorted(above.values())[-2] < above["router"]


def test_the_journal_is_only_ever_appended_to(tmp_path: Path) -> None:
    JsonlLogger(tmp_path).log_metrics({"a": 1.0}, step=1)
    JsonlLogger(tmp_path).log_metrics({"a": 2.0}, step=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["a"]) for line in lines] == [(1, 1.0), (2, 2.0)]


def test_wandb_without_a_key_writes_offline_into_the_run_folder(
    recipe_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mobiq_lightning.cli import main

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    logger = "--trainer.logger={class_path: mobiq_lightning.loggers.WandbLogger, init_args: {group: budgets}}"
    stages = "--model.stages=[{share: 1, train: [ranges, routers]}]"
    assert main(["fit", *recipe_arguments, logger, "--model.epochs_per_block=1", stages]) == 0
    import wandb

    wandb.finish()
    assert "WANDB_MODE" not in os.environ  # later runs of this process are their own
    assert "written offline" in capsys.readouterr().err
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1
    last = time.monotonic() + 60
    while b"comparison" not in (content := files[0].read_bytes()) and time.monotonic() < last:
        time.sleep(0.1)  # W&B's own process writes it, on a busy machine later than `finish` returns
    for expected in (b"eval/ppl", b"used_bits/model.layers.0", b"threshold/4_bits", b"block/loss", b"comparison"):
        assert expected in content


def test_a_wandb_key_is_found_without_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert WandbLogger(save_dir=str(tmp_path))._wandb_init.get("mode") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert WandbLogger(save_dir=str(tmp_path))._wandb_init.get("mode") is None
    assert WandbLogger(save_dir=str(tmp_path), offline=True)._wandb_init.get("mode") == "offline"
