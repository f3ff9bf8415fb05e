"""Outlier migration: the worst tokens of each precision, and calibrations used where they were not made for."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mobiq_lightning.cli import main
from mobiq_lightning.errors import DataError, MobiqError
from mobiq_lightning.nn import routed_inputs
from mobiq_lightning.outliers import (
    InputErrors,
    TokenRecord,
    overlap_metrics,
    print_overlaps,
    read_uniformly,
    same_bits,
    spread_windows,
    summarize_tokens,
)
from mobiq_lightning.outliers.findings import matrix_verdict, overlap_verdict
from mobiq_lightning.outliers.overlap import overlaps, rank_correlations, worst_tokens
from mobiq_lightning.sources import IGNORED, Windows, pad_windows
from mobiq_lightning.strategies import BlockReconstruction, ResidualSlices
from tests.conftest import UNTIMED

BITS = (2, 4, 8)


def no_timing(*more: str) -> str:
    callbacks = [UNTIMED, *more]
    return f"--trainer.callbacks=[{', '.join(callbacks)}]"


class TestOverlap:
    errors = torch.tensor(
        [
            [9.0, 8, 7, 1, 1, 1, 1, 1, 1, 1],  # worst 0, 1, 2
            [9.0, 0, 7, 8, 0, 0, 0, 0, 0, 0],  # worst 0, 2, 3
            [0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9],  # worst 7, 8, 9
        ]
    )

    def test_counts_the_worst_tokens_that_two_precisions_share(self) -> None:
        assert overlaps(self.errors, (2, 3, 8), 0.3) == pytest.approx({"2-3": 2 / 3, "2-8": 0, "3-8": 0}, abs=1e-6)

    def test_takes_the_earlier_of_equal_errors(self) -> None:
        equal = torch.ones(2, 10)
        assert worst_tokens(equal, 0.3).nonzero()[:, 1].tolist() == [0, 1, 2, 0, 1, 2]
        assert worst_tokens(self.errors, 0.5)[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]

    def test_of_unrelated_errors_is_what_chance_gives(self) -> None:
        errors = torch.rand(3, 20_000, generator=torch.Generator().manual_seed(0))
        assert list(overlaps(errors, BITS, 0.1).values()) == pytest.approx([0.1] * 3, abs=0.02)
        assert list(rank_correlations(errors, BITS).values()) == pytest.approx([0.0] * 3, abs=0.03)

    def test_rank_correlation_gives_equal_errors_the_mean_of_their_ranks(self) -> None:
        errors = torch.tensor([[1.0, 2, 2, 3], [10.0, 20, 30, 40], [4.0, 3, 2, 1]])
        # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 1.5, standard deviations sqrt(1.5), sqrt(5/3).
        expected = 1.5 / (1.5 * 5 / 3) ** 0.5
        found = rank_correlations(errors, BITS)
        assert found == pytest.approx({"2-4": expected, "2-8": -expected, "4-8": -1.0}, abs=1e-6)

    def test_refuses_a_share_of_no_token(self) -> None:
        with pytest.raises(DataError, match=r"0\.1 of 4 measured tokens are 0 tokens"):
            worst_tokens(torch.ones(2, 4), 0.1)


def record_of(kl: Tensor, positions: Tensor) -> TokenRecord:
    bits, n = (2, 4, 8)[: len(kl)], kl.shape[1]
    zero = torch.zeros(n, dtype=torch.int64)
    return TokenRecord(bits, zero, positions, zero, torch.zeros(n), torch.zeros_like(kl), kl)


class TestFindings:
    def test_the_first_token_of_a_window_is_left_out(self) -> None:
        kl = torch.tensor([[99.0, 1, 2, 99, 3, 4], [99.0, 4, 1, 99, 2, 3]])
        found = summarize_tokens(record_of(kl, torch.tensor([0, 1, 2, 0, 1, 2])), 0.5)
        assert (found["n_tokens"], found["chance"]) == (4, 0.5)
        assert found["model"]["overlap"] == {"2-4": 0.5}  # tokens 4 and 5 against 1 and 5
        assert found["model"]["mean_error"] == {"2": 2.5, "4": 2.5}
        assert found["model"]["share_of_error"] == pytest.approx({"2": 0.7, "4": 0.7})

    def test_the_control_compares_calibrations_at_the_same_bits(self) -> None:
        one = record_of(torch.tensor([[1.0, 2, 3, 4], [1.0, 2, 3, 4]]), torch.arange(1, 5))
        other = record_of(torch.tensor([[1.0, 2, 3, 4], [4.0, 3, 2, 1]]), torch.arange(1, 5))
        control = same_bits(one, other, 0.5)
        assert control == {"2": 1.0, "4": 0.0}
        tokens = {"elastic": summarize_tokens(one, 0.5), "same_bits": control}
        assert "share 0% to 100%" in overlap_verdict(tokens)

    def test_the_verdict_counts_the_cases_and_names_the_papers(self) -> None:
        perplexity = {(3, 3): 30.0, (3, 4): 27.5, (4, 3): 31.5, (4, 4): 25.0}
        rows = [
            {"calibrated_at": c, "used_at": u, "perplexity": p, "kl": p / 100, "change": p / perplexity[u, u] - 1}
            for (c, u), p in perplexity.items()
        ]
        text = matrix_verdict(rows)
        assert "in 2 of 2 cases, a lower one in 0, and is within 0.1% in 0" in text
        assert "used at 4: 27.50 against 25.00 (+10.0%), KL 0.2750 against 0.2500" in text


@pytest.fixture(scope="module")
def pair(make_model: Callable[..., Path], finished: tuple[Path, list[str]]) -> tuple[Any, Any, Any]:
    """A source model, the elastic model made of it, and its routed inputs wrapped for rounding."""
    from mobiq_lightning import load
    from mobiq_lightning.evaluation import wrap_for_rounding
    from mobiq_lightning.nn import BlockLayout
    from mobiq_lightning.sources import load_source

    full = load_source(str(make_model())).model
    return full, load(finished[0]), wrap_for_rounding(full, BlockLayout(), 16)[0]


def windows(*lengths: int) -> Windows:
    generator = torch.Generator().manual_seed(1)
    return Windows([torch.randint(3, 300, (n,), generator=generator) for n in lengths])


class TestTokenErrors:
    def test_are_those_of_a_direct_computation_in_float64(self, pair: tuple[Any, Any, Any]) -> None:
        full, elastic, rounded = pair
        text = windows(5, 9, 7)
        watched = InputErrors(full, elastic, BITS)
        batches = spread_windows(text, 2, None)
        record = read_uniformly(full, rounded, elastic, routed_inputs(elastic), batches, BITS, watched)
        assert record.windows.tolist() == [0] * 4 + [1] * 8 + [2] * 6
        assert record.positions.tolist() == [*range(4), *range(8), *range(6)]
        assert record.ids.tolist() == [token for w in text.windows for token in w[:-1].tolist()]
        assert list(record.inputs) == [
            f"model.layers.{block}.{name}"
            for block in range(2)
            for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
        ]
        for name, expected in self.direct(full, elastic, text).items():
            torch.testing.assert_close(record.inputs[name].double(), expected, rtol=2e-4, atol=0)

    def direct(self, full: Any, elastic: Any, text: Windows) -> dict[str, Tensor]:
        """One window and one linear at a time, from what the block-by-block forward pass gives the linears."""
        groups = [("self_attn", ["q_proj", "k_proj", "v_proj"]), ("mlp", ["gate_proj", "up_proj"])]
        groups += [("self_attn", ["o_proj"]), ("mlp", ["down_proj"])]
        found: dict[str, list[Tensor]] = {}
        for ids in text.windows:
            for block in range(2):
                for part, names in groups:
                    paths = [f"model.layers.{block}.{part}.{name}" for name in names]
                    x = self.input_of(full, paths[0], ids)[:-1]
                    off, size = torch.zeros(len(BITS), len(x), dtype=torch.float64), torch.zeros(len(x))
                    for path in paths:
                        weight = full.get_submodule(path).weight.double()
                        size = size + (x @ weight.T).square().sum(1)
                        for row, depth in enumerate(BITS):
                            read = elastic.get_submodule(path).packed.weight_at(depth).double()
                            off[row] += (x @ (weight - read).T).square().sum(1)
                    found.setdefault(paths[0], []).append(off / size)
        return {name: torch.cat(parts, dim=1) for name, parts in found.items()}

    def input_of(self, full: Any, path: str, ids: Tensor) -> Tensor:
        from mobiq_lightning.nn import full_precision

        caught: list[Tensor] = []
        hook = full.get_submodule(path).register_forward_pre_hook(lambda _, args: caught.append(args[0][0].double()))
        with torch.no_grad(), full_precision(routed_inputs(full)):
            full(ids[None])
        hook.remove()
        return caught[0]

    def test_kl_and_likelihood_are_those_of_the_logits(self, pair: tuple[Any, Any, Any]) -> None:
        from mobiq_lightning.nn import fixed_depth, full_precision

        full, elastic, rounded = pair
        text = windows(6, 11)
        record = read_uniformly(full, rounded, elastic, routed_inputs(elastic), [pad_windows([text[0], text[1]])], BITS)
        for row, depth in enumerate(BITS):
            kl, nll = [], []
            for ids in text.windows:
                with torch.no_grad(), full_precision(rounded):
                    p = full(ids[None]).logits[0, :-1].double().log_softmax(-1)
                with torch.no_grad(), fixed_depth(routed_inputs(elastic), depth):
                    q = elastic(ids[None]).logits[0, :-1].double().log_softmax(-1)
                kl.append(F.kl_div(q, p, log_target=True, reduction="none").sum(-1))
                nll.append(F.nll_loss(q, ids[1:], reduction="none"))
            torch.testing.assert_close(record.kl[row].double(), torch.cat(kl), rtol=1e-3, atol=1e-8)
            torch.testing.assert_close(record.nll[row].double(), torch.cat(nll), rtol=1e-4, atol=1e-5)

    def test_inputs_of_a_rotated_model_are_not_compared_and_it_is_said(
        self, pair: tuple[Any, Any, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        full, elastic, rounded = copy.deepcopy(pair)
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = full.get_submodule(f"model.layers.0.self_attn.{name}")
            linear.weight.data = linear.weight.data.roll(1, 1)
        watched = InputErrors(full, elastic, BITS)
        batches = [pad_windows([windows(20)[0]])]
        record = read_uniformly(full, rounded, elastic, routed_inputs(elastic), batches, BITS, watched)
        assert record.inputs == {}
        tokens = {"elastic": summarize_tokens(record, 0.2)}
        print_overlaps(tokens)
        assert "rotated before they were sliced" in " ".join(capsys.readouterr().out.split())
        assert set(overlap_metrics(tokens["elastic"])) == {
            f"outliers/model/{figure}_{pair}"
            for figure in ("overlap", "rank_correlation")
            for pair in ("2-4", "2-8", "4-8")
        }

    def test_fewer_windows_are_spread_over_all(self) -> None:
        batches = list(spread_windows(windows(*range(3, 23)), 2, 4))
        assert [int((row != IGNORED).sum()) for batch in batches for row in batch["labels"]] == [3, 8, 13, 18]


class StoppingSlices(ResidualSlices):
    """Slices of a run that ends when a file appears, as if the power went out."""

    stop_at: Path | None = None

    def weight_at(self, weight: Tensor, n_slices: int) -> Tensor:
        if self.stop_at is not None and self.stop_at.exists() and torch.is_grad_enabled():
            raise MobiqError("the power went out")
        return super().weight_at(weight, n_slices)


class TestCommand:
    def test_an_interrupted_study_keeps_what_is_finished_and_ends_with_tables_and_files(
        self,
        recipe_arguments: list[str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        run = tmp_path / "run"
        slices = f"{{class_path: {__name__}.StoppingSlices, init_args: {{slice_bits: [2, 2, 4], group_size: 16}}}}"
        command = ["outliers", *recipe_arguments, f"--model.slices={slices}", no_timing(), "--bits", "2,4"]
        last = run / "calibrated-at-4" / "checkpoints" / "epoch-000001.sha256"
        monkeypatch.setattr(StoppingSlices, "stop_at", last)
        assert main(command) == 1
        assert "the power went out" in capsys.readouterr().err
        finished = {p: p.stat().st_mtime_ns for p in (run / "calibrated-at-2" / "elastic").iterdir()}
        assert finished
        assert not (run / "calibrated-at-4" / "elastic").exists()
        monkeypatch.setattr(StoppingSlices, "stop_at", None)
        assert main(command) == 0
        captured = capsys.readouterr()
        assert f"Resuming from epoch-000001.ckpt in {run / 'calibrated-at-4'}" in captured.err
        assert f"{run / 'calibrated-at-2'} holds this run, finished" in captured.err
        assert {p: p.stat().st_mtime_ns for p in finished} == finished
        assert "tokens that two precisions share" in captured.out
        assert "used at 4" in captured.out
        assert "round to nearest" not in captured.out  # tables of the runs stay in their folders
        self.check_files(run)
        # The folder is this recipe's; others are told so, and how they differ.
        assert main([*command, "--model.rates.ranges=0.5"]) == 1
        assert "model.rates.ranges: 0.02 -> 0.5" in capsys.readouterr().err

    def check_files(self, run: Path) -> None:
        found = json.loads((run / "outliers.json").read_text())
        rows = {(r["calibrated_at"], r["used_at"]): r for r in found["matrix"]["rows"]}
        assert list(rows) == [(c, u) for c in (2, 4, "all", "none") for u in (2, 4)]
        assert rows[2, 2]["change"] == rows[4, 4]["change"] == 0
        for (_, used_at), row in rows.items():
            assert row["change"] == pytest.approx(row["perplexity"] / rows[used_at, used_at]["perplexity"] - 1)
        # What the run for all depths says of itself, where all allocations read the same.
        own = json.loads((run / "calibrated-at-all" / "results.json").read_text())["rows"]
        figure = {(r["allocation"], r["target_bits"]): r["perplexity"] for r in own}
        assert rows["all", 2]["perplexity"] == pytest.approx(figure["router", 2.0], rel=1e-5)
        assert rows["none", 4]["perplexity"] == pytest.approx(figure["rtn", 4.0], rel=1e-5)
        assert found["matrix"]["full_perplexity"] == pytest.approx(figure["full", 32.0], rel=1e-5)
        assert set(found["tokens"]) == {"elastic", "own_calibration", "uncalibrated", "same_bits"}
        assert len(found["tokens"]["elastic"]["inputs"]) == 8
        assert found["command"].startswith("python -m mobiq_lightning outliers --config ")
        recipe = (run / "calibrated-at-2.yaml").read_text()
        assert recipe.startswith(f"# {found['runs']['calibrated-at-2']}\n")
        assert "depth_weights:\n        2: 1.0\n" in recipe
        table = list(csv.DictReader((run / "outliers.csv").read_text().splitlines()))
        assert len(table) == found["protocol"]["n_tokens"]
        assert set(table[0]) == {"window", "position", "token", "full_nll", "kl_at_2_bits", "kl_at_4_bits"}
        assert (run / "outliers.png").read_bytes().startswith(b"\x89PNG")
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert logged[-1]["outliers/ppl/calibrated_at_2/used_at_4"] == pytest.approx(rows[2, 4]["perplexity"])

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["--bits", "2,5"], "bits [5] are no depths of the slices; depths are [2, 3, 4, 6, 8]"),
            (["--bits", "4"], "bits [4]: precisions are compared with each other, so give at least two"),
            (["--bits", "2,2.5"], "--bits 2,2.5: give whole bits separated by commas"),
            (["--share", "1.5"], "--share: '1.5'; a number above 0"),
            ([f"--model.objective={__name__}.Other"], "Other has no depth_weights"),
            (["--shares", "0.2"], "shares: no such key"),
        ],
    )
    def test_refuses_what_it_cannot_compare(
        self, recipe_arguments: list[str], capsys: pytest.CaptureFixture[str], given: list[str], message: str
    ) -> None:
        assert main(["outliers", *recipe_arguments, *given]) == 2
        assert message in capsys.readouterr().err


class Other(BlockReconstruction):
    """An objective that cannot be told which depths count."""

    def __init__(self) -> None:
        super().__init__()


class TestCallback:
    def arguments(self, recipe_arguments: list[str], given: str) -> list[str]:
        callback = f"{{class_path: mobiq_lightning.callbacks.OutlierMigration, init_args: {{{given}}}}}"
        return ["fit", *recipe_arguments, no_timing(callback)]

    def test_measures_the_checkpoint_of_a_run(
        self, recipe_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(self.arguments(recipe_arguments, "bits: [8, 2, 4], share: 0.2, max_windows: 5")) == 0
        assert "Worst 20%" in capsys.readouterr().out
        run = tmp_path / "run"
        found = json.loads((run / "outliers.json").read_text())
        elastic = found["tokens"]["elastic"]
        assert (found["bits"], found["protocol"]["outlier_windows"]) == ([2, 4, 8], 5)
        assert (elastic["share"], elastic["chance"]) == (0.2, pytest.approx(0.2, abs=0.005))
        assert set(elastic["model"]["overlap"]) == {"2-4", "2-8", "4-8"}
        assert all(0 <= share <= 1 for one in elastic["inputs"].values() for share in one["overlap"].values())
        errors = list(elastic["inputs_mean"]["mean_error"].values())
        assert errors == sorted(errors, reverse=True)
        assert (run / "outliers.png").is_file()
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in logged if {"eval/ppl", "outliers/model/overlap_2-4"} & set(line)]
        assert len(steps) == 4
        assert steps == sorted(steps)  # W&B drops what comes with an earlier step
        values = next(line for line in logged if "outliers/model/overlap_2-4" in line)
        assert values["outliers/model/overlap_2-4"] == elastic["model"]["overlap"]["2-4"]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("bits: [2, 7]", "bits [7] are no depths of the slices"),
            ("share: 0", "share (0) is the part of the tokens"),
            ("max_windows: 0", "max_windows (0) must be at least 1"),
        ],
    )
    def test_refuses_settings_before_anything_is_loaded(
        self, recipe_arguments: list[str], capsys: pytest.CaptureFixture[str], given: str, message: str
    ) -> None:
        assert main(self.arguments(recipe_arguments, given)) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert "block 1" not in captured.err
