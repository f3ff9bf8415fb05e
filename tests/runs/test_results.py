"""The schema of what a run leaves: files read as they were written, and errors that say what is wrong where."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mobiq_lightning.errors import ResultsError
from mobiq_lightning.runs import LayerGainsFile, Results, add_to_results, read_results, summarize, verdict

SHIPPED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))
OF_RUNS = [path for path in SHIPPED if "slices" in json.loads(path.read_text())]
OF_THIS_VERSION = [path for path in OF_RUNS if "guards" in json.loads(path.read_text())]

ENTRY = {
    "task": "cloze",
    "metric": "acc",
    "value": 0.5,
    "stderr": None,
    "n_examples": 6,
    "num_fewshot": 0,
    "limit": None,
    "lm_eval": "0.4",
    "environment": {"python": "3.11"},
    "bits": "full",
    "used_bits": None,
    "all_in_bits": None,
}


def shipped() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(OF_THIS_VERSION[0].read_text())
    return found


def test_there_are_results_of_both_kinds_to_test_with() -> None:
    assert len(OF_THIS_VERSION) >= 10
    assert len(OF_RUNS) > len(OF_THIS_VERSION)


@pytest.mark.parametrize("path", OF_RUNS, ids=lambda path: path.stem)
def test_results_of_runs_are_read_also_those_of_older_versions(path: Path) -> None:
    measured, stored = read_results(path).measured, json.loads(path.read_text())
    assert measured is not None
    assert [row.to_json() for row in measured.rows] == stored["rows"]
    assert measured.protocol.to_json() == stored["protocol"]


@pytest.mark.parametrize("path", OF_THIS_VERSION, ids=lambda path: path.stem)
def test_reading_and_writing_results_changes_no_key_order_or_value(path: Path) -> None:
    stored = json.loads(path.read_text())
    assert json.dumps(Results.from_json(stored, path).to_json()) == json.dumps(stored)


def test_parts_that_were_not_measured_are_not_written() -> None:
    assert Results().to_json() == {}
    assert Results.from_json({"lm_eval": [ENTRY]}, "x").to_json() == {"lm_eval": [ENTRY]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("protocol"), "results.json: protocol is missing; a mapping is expected there"),
        (lambda r: r["rows"][3].pop("kl"), r"results.json: rows\[3\].kl is missing; a number is expected there"),
        (lambda r: r["rows"][0].update(seed="0"), r'rows\[0\].seed holds "0"; a whole number or null is expected'),
        (lambda r: r["rows"][0].update(kl=True), r"rows\[0\].kl holds true; a number is expected"),
        (lambda r: r["rows"][0].update(allocation="rnt"), r"rows\[0\].allocation holds \"rnt\"; one of 'full', 'rtn'"),
        (lambda r: r.update(rows={}), "rows holds {}; a list is expected"),
        (lambda r: r["router"].update({"class": 3}), "router.class holds 3; a text is expected"),
        (lambda r: r["slices"].update(slice_bits=[2, 1.5]), r"slices.slice_bits\[1\] holds 1.5; a whole number"),
        (lambda r: r.update(layer_gains=[]), r"layer_gains holds \[\]; a mapping or a text is expected"),
        (lambda r: r["rows"][1].update(perplexity=-1), r"rows\[1\].perplexity holds -1; a number of at least 0"),
        (lambda r: r["rows"][1].update(kl=10**300), r"rows\[1\].kl holds 10+\.\.\.; a number of at most 9"),
        (lambda r: r["rows"][1].update(used_bits=float("nan")), r"rows\[1\].used_bits holds NaN; a finite number"),
        (
            lambda r: r["rows"][1].update(used_bits=1e6),
            r"rows\[1\].used_bits holds 1000000.0; a number of at least 0 and",
        ),
        (
            lambda r: r["slices"].update(slice_bits=[2, 0]),
            r"slices.slice_bits\[1\] holds 0; a number of at least 1 and",
        ),
        (lambda r: r.update(latency={"device": "cpu"}), "latency.what is missing; a text is expected there"),
        (lambda r: r.update(model="\ud800"), r'model holds "\\ud800"; a text without broken characters is expected'),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_place_and_what_to_do(change: Any, message: str) -> None:
    stored = shipped()
    change(stored)
    with pytest.raises(ResultsError, match=message) as caught:
        Results.from_json(stored, "runs/x/results.json")
    assert str(caught.value).startswith("runs/x/results.json: ")
    assert "restore it, or remove it and repeat the command that wrote it" in str(caught.value)


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"model": ')
    with pytest.raises(ResultsError, match=r"results\.json is not valid JSON .* restore it"):
        read_results(tmp_path / "results.json")
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ResultsError, match=r"results\.json holds \[\]; a mapping is expected"):
        read_results(tmp_path / "results.json")


def test_adding_a_part_keeps_what_only_another_version_knows(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert add_to_results(path, lm_eval=[ENTRY]) == Results.from_json({"lm_eval": [ENTRY]}, path)
    stored = {**shipped(), "of_the_future": 1}
    path.write_text(json.dumps(stored))
    latency = {"device": "cpu", "what": "w", "plain": "float32", "budgets": [], "of_the_future": 1}
    found = add_to_results(path, latency=latency)
    assert found.latency == latency
    assert json.loads(path.read_text()) == {**stored, "latency": latency}
    path.write_text(json.dumps({"rows": 1}))
    with pytest.raises(ResultsError, match="model is missing"):
        add_to_results(path, latency={})
    assert json.loads(path.read_text()) == {"rows": 1}


@pytest.mark.parametrize("methods", [["probes"], ["gradients"], ["gradients", "probes"]])
def test_gains_lie_flat_in_their_rows_in_the_order_in_which_they_were_measured(methods: list[str]) -> None:
    spread = {"token_std": 0.1, "first_token": 1.0, "norm_rank": 0.5, "router_rank": 0}
    row = {"input": "q", "weights": 64, "slice": 2, "bits": 1, **dict.fromkeys(methods, 0.25)}
    row |= spread if "probes" in methods else {}
    about = {"windows": 8, "seq_len": 32} | ({"reference_bits": 4} if "probes" in methods else {})
    stored = {**about, "unit": "nats per token", "rows": [row]}
    found = LayerGainsFile.from_json(stored, "layer_gains.json")
    assert found.rows[0].gains == dict.fromkeys(methods, 0.25)
    assert (found.rows[0].tokens is not None) == ("probes" in methods)
    assert json.dumps(found.to_json()) == json.dumps(stored)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p.write_bytes(b"\xff\xfe{"),
        lambda p: p.write_text("[" * 100_000),
        lambda p: p.write_text("{}x"),
        lambda p: p.write_text(""),
        lambda p: p.write_text("9" * 5000),
        lambda p: p.write_text("[1]"),
        lambda p: os.truncate(p, 2**40) if p.write_text("{") else None,
    ],
)
def test_a_file_that_holds_no_results_is_refused_by_name(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "results.json")
    with pytest.raises(ResultsError, match=r"results\.json"):
        read_results(tmp_path / "results.json")


def test_infinite_perplexities_are_read_and_told_apart() -> None:
    stored = shipped()
    for row in stored["rows"]:
        row["perplexity"] = row["kl"] = float("inf")
    measured = Results.from_json(stored, "x").measured
    assert measured is not None
    assert not any(row.finite for row in measured.rows)
    assert summarize([*measured.rows, *measured.rows])[0].perplexity == float("inf")
    assert verdict(measured.rows) == ""
