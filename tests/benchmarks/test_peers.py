"""The benchmark of peers: its arithmetic, its journal, and what becomes of a peer that fails. No peer is installed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks are not installed

from benchmarks.quality import peers, worker
from benchmarks.quality.figure import plot
from benchmarks.quality.peer import Peer, Task
from benchmarks.quality.protocol import Protocol
from benchmarks.quality.registry import PEERS
from benchmarks.quality.rows import DONE, FAILED, FULL, MISSING, Cell, Journal, plan
from benchmarks.quality.summary import best_peer, elastic_means, means, read_elastic, verdicts
from benchmarks.quality.table import failures, print_peers
from benchmarks.quality.wrappers.clipping import SLICES
from benchmarks.quality.wrappers.rounding import round_to_nearest


def row(peer: str, bits: int, perplexity: float, seed: int | None = None, **more: Any) -> dict[str, Any]:
    key = {"peer": peer, "bits": bits, "group_size": 64, "seed": seed}
    return {**key, "status": DONE, "perplexity": perplexity, **more}


def rows() -> list[dict[str, Any]]:
    return [
        row("A", 2, 40.0, 0),
        row("A", 2, 44.0, 1),
        row("B", 2, 50.0),
        row("C", 2, math.nan),
        row("A", 4, 26.0, 0),
        row("B", 4, 25.0),
        row("D", 4, 1.0, status=FAILED, error="RuntimeError: no"),
    ]


def test_seeds_are_averaged_and_the_best_peer_is_the_lowest_mean_that_is_a_number() -> None:
    averaged = means(rows())
    two, four = best_peer(averaged, 2, 64), best_peer(averaged, 4, 64)
    assert two is not None
    assert four is not None
    assert (two["peer"], two["perplexity"], two["n"], two["seeds"]) == ("A", 42.0, 2, [0, 1])
    assert two["spread"] == pytest.approx(math.sqrt(8))
    assert (four["peer"], four["perplexity"]) == ("B", 25.0)  # a row that failed counts for nothing
    assert best_peer(averaged, 2, 32) is None


def test_targets_are_shares_of_the_best_peer_and_met_or_not() -> None:
    elastic = [
        {"group_size": 64, "target_bits": 2.0, "used_bits": 2.0, "perplexity": 35.6},
        {"group_size": 64, "target_bits": 4.0, "used_bits": 4.0, "perplexity": 24.9},
    ]
    found = {v["bits"]: v for v in verdicts(means(rows()), elastic, (2, 3, 4), (64,))}
    assert set(found) == {2, 4}  # nothing ran at three bits
    assert found[2]["target"] == pytest.approx(0.85 * 42)
    assert found[2]["ratio"] == pytest.approx(35.6 / 42)
    assert found[2]["met"]
    assert found[4]["target"] == pytest.approx(0.995 * 25)
    assert not found[4]["met"]


def test_a_router_that_spends_other_bits_is_not_held_against_a_peer() -> None:
    elastic = [{"group_size": 64, "target_bits": 2.0, "used_bits": 2.3, "perplexity": 30.0}]
    (found,) = verdicts(means(rows()), elastic, (2,), (64,))
    assert found["ours"] is None
    assert found["met"] is None


def elastic_run(folder: Path, perplexity: float, data_hash: str = "abc") -> Path:
    (folder / "elastic").mkdir(parents=True)
    (folder / "elastic" / "config.json").write_text(json.dumps({"quantization_config": {"group_size": 64}}))
    budgets = [{"target_bits": 2.0, "used_bits": 2.0, "perplexity": perplexity}]
    listed = [{"allocation": name, **budget} for name in ("router", "random") for budget in budgets]
    (folder / "results.json").write_text(json.dumps({"protocol": {"data_hash": data_hash}, "rows": listed}))
    return folder


def test_elastic_runs_are_read_and_averaged(tmp_path: Path) -> None:
    runs = [elastic_run(tmp_path / "a", 30.0), elastic_run(tmp_path / "b", 32.0)]
    (found,) = elastic_means(row for run in runs for row in read_elastic(run, "abc"))
    assert (found["perplexity"], found["n"], found["group_size"]) == (31.0, 2, 64)


def test_elastic_runs_on_other_text_or_unfinished_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="measured on other text"):
        read_elastic(elastic_run(tmp_path / "a", 30.0), "xyz")
    with pytest.raises(ValueError, match="folder of a finished run"):
        read_elastic(tmp_path / "b", "abc")


def test_the_same_command_leaves_out_what_is_done(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    peer = Peer("A", lambda task: task.model, None, "")
    cells = plan(peer, (2, 3), (64,), (0, 1))
    assert len(cells) == 4
    journal.add(row("A", 2, 40.0, 0))
    journal.add(row("A", 3, 0.0, 0, status=FAILED, error="E: no"))
    journal.add(row("A", 2, 0.0, 1, status=MISSING, error="pip install a"))
    with journal.path.open("a") as file:
        file.write('{"peer": "A", "bits": 3, "gro')  # killed while writing
    assert journal.pending(cells) == [Cell("A", 2, 64, 1), Cell("A", 3, 64, 1)]
    assert journal.pending(cells, again=True) == [Cell("A", 3, 64, 0), Cell("A", 2, 64, 1), Cell("A", 3, 64, 1)]


def test_a_row_added_after_a_kill_is_not_lost(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.path.write_text('{"peer": "A", "bits": 3, "gro')
    journal.add(row("A", 2, 40.0, 0))
    assert [r["perplexity"] for r in journal.rows()] == [40.0]


def test_a_folder_belongs_to_one_protocol(tmp_path: Path) -> None:
    Journal(tmp_path).claim(Protocol())
    Journal(tmp_path).claim(Protocol())
    with pytest.raises(ValueError, match="seq_len 128 instead of 256"):
        Journal(tmp_path).claim(Protocol(seq_len=256))


def test_uncalibrated_peers_are_measured_once_and_only_at_bits_that_they_offer() -> None:
    peer = Peer("A", lambda task: task.model, None, "", calibrated=False, bits=(2, 4))
    assert plan(peer, (2, 3, 4), (32,), (0, 1, 2)) == [Cell("A", 2, 32, None), Cell("A", 4, 32, None)]


@pytest.fixture
def protocol(make_model: Any, text_file: Path) -> Protocol:
    return Protocol(str(make_model("llama")), str(text_file), str(text_file), 4, 32, 64, 4)


def test_a_failing_peer_is_recorded_with_its_error(protocol: Protocol) -> None:
    def run(task: Task) -> Any:
        raise RuntimeError("\nneeds a GPU\nand more")

    found = worker.row_of(Peer("A", run, None, ""), Cell("A", 2, 4, 0), protocol)
    assert (found["status"], found["error"]) == (FAILED, "RuntimeError: needs a GPU")


def test_a_peer_that_is_not_installed_says_how_to_install_it(protocol: Protocol) -> None:
    peer = Peer("A", lambda task: task.model, "no-such-package-at-all", "")
    found = worker.row_of(peer, Cell("A", 2, 4, 0), protocol)
    assert (found["status"], found["error"]) == (MISSING, "pip install no-such-package-at-all")


def test_rounding_is_measured_with_its_cost(protocol: Protocol) -> None:
    coarse, fine = (worker.row_of(PEERS["RTN"], Cell("RTN", bits, 4, None), protocol) for bits in (2, 8))
    assert fine["status"] == DONE
    assert fine["perplexity"] != coarse["perplexity"]
    assert fine["peak_mb"] > 0
    assert fine["versions"]["torch"]


def test_a_process_that_dies_costs_one_row(tmp_path: Path, protocol: Protocol) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho out of memory\nexit 9\n")
    interpreter.chmod(0o755)
    journal, cells = Journal(tmp_path), [Cell("RTN", bits, 4, None) for bits in (2, 3)]
    peers.run_peer(PEERS["RTN"], cells, journal, protocol, str(interpreter))
    assert [r["error"] for r in journal.rows()] == ["its process ended with exit code 9: out of memory"] * 2


def test_rounding_has_an_integer_zero_and_as_many_values_as_codes() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    rounded = round_to_nearest(weight, 2, 16)
    for group in rounded.unflatten(1, (-1, 16)).flatten(0, 1):
        assert len(group.unique()) <= 4
        assert 0.0 in group or group.min() > 0 or group.max() < 0
    assert torch.allclose(round_to_nearest(weight, 8, 16), weight, atol=0.02)


def test_every_peer_has_a_name_of_its_own_and_clipping_a_depth_for_each_precision() -> None:
    assert len({peer.name for peer in PEERS.values()}) == len(PEERS)
    assert all(bits in [sum(s[:n]) for n in range(1, len(s) + 1)] for bits, s in SLICES.items())


def test_peers_in_a_python_of_their_own() -> None:
    peer = Peer("A", lambda task: task.model, "package-a", "")
    assert peers.interpreter(peer, ["package-a=/elsewhere/python"]) == "/elsewhere/python"
    assert peers.interpreter(peer, []) == sys.executable


def test_table_and_plot_name_peers_targets_and_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    averaged = means(rows())
    elastic = elastic_means(
        {"group_size": 64, "target_bits": bits, "used_bits": bits, "perplexity": 30.0} for bits in (2.0, 2.5)
    )
    found = {
        "model": "M",
        "protocol": {"n_tokens": 100},
        FULL: 24.0,
        "rows": rows(),
        "not_offered": {"C": [4]},
        "means": averaged,
        "elastic": elastic,
        "verdicts": verdicts(averaged, elastic, (2, 4), (64,)),
    }
    print_peers(found)
    printed = capsys.readouterr().out
    assert "42.00 ± 2.83 (2)" in printed
    assert "35.70 (0.85x)" in printed
    assert "met" in printed
    assert "not offered" in printed
    assert failures(rows()) == ["D (4 bits, group 64) failed: RuntimeError: no"]
    plot(found, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_the_command_measures_prints_and_goes_on(
    tmp_path: Path, protocol: Protocol, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", protocol.model, "--source", protocol.source, "--eval_source", protocol.eval_source]
    command += ["--n_samples", "4", "--seq_len", "32", "--eval_seq_len", "64", "--eval_max_windows", "4"]
    command += [
        "--n_generated",
        "2",
        "--bits",
        "2",
        "--group_sizes",
        "4",
        "--peers",
        "RTN",
        "--to",
        str(tmp_path / "to"),
    ]
    peers.main(command)
    first = json.loads((tmp_path / "to" / "peers.json").read_text())
    peers.main(command)
    again = json.loads((tmp_path / "to" / "peers.json").read_text())
    assert first["rows"] == again["rows"]
    assert len(first["rows"]) == 1
    assert first["rows"][0]["status"] == DONE
    assert first["protocol"]["calibration"]["n_generated"] == 2
    assert "best peer" in capsys.readouterr().out
