"""The latency command, and the speeds that a run leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mobiq_lightning import BitsPolicy, load
from mobiq_lightning.cli import main
from mobiq_lightning.latency.of_model import neighbours
from mobiq_lightning.latency.shapes import shapes_of_checkpoint
from mobiq_lightning.nn import ElasticLinear
from mobiq_lightning.runtime import warm_up
from mobiq_lightning.runtime.warming import token_counts
from mobiq_lightning.serving import measure_speed, random_prompt, seconds_per_step
from tests.conftest import Run
from tests.latency.journals import quick

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")


@without_cuda
class TestCommand:
    def test_without_cuda_the_reference_is_timed_and_everything_says_so(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["latency", "--shapes", "64x128", "--to", str(tmp_path / "out")]) == 0
        printed = capsys.readouterr().out
        assert "the CPU reference, which says nothing of GPUs" in printed
        stored = json.loads((tmp_path / "out" / "latency.json").read_text())
        assert stored["path"] == "reference"
        assert {row["path"] for row in stored["rows"]} == {"reference"}
        assert {row["section"] for row in stored["rows"]} == {"decode", "batch", "model"}
        assert {"torch", "triton", "device", "date"} <= set(stored["environment"])
        assert stored["ceilings"]["copy_gb_per_s"] > 0
        assert stored["noise"]["what"] == "given.64x128 at 2 bits, timed twice"
        assert stored["method"]["dtype"] == "float32"
        decode = [row for row in stored["rows"] if row["section"] == "decode" and row["shape"] == "given.64x128"]
        assert [row["bits"] for row in decode if row["product"] == "elastic"] == [2, 3, 4, 6, 8]
        copied = 1e9 * stored["ceilings"]["copy_gb_per_s"]
        for row in decode:
            assert row["of_copy"] == pytest.approx(row["bytes"] / (row["us"] * 1e-6) / copied)
        assert any(row["bits"] == "mixed" for row in stored["rows"])
        speeds = {row["bits"]: row for row in stored["rows"] if row["section"] == "model"}
        assert set(speeds) == {32, 2, 4, 8}
        assert [speeds[bits]["used_bits"] for bits in (2, 4, 8)] == [2, 4, 8]
        assert (tmp_path / "out" / "latency.png").read_bytes().startswith(b"\x89PNG")

    def test_the_shapes_of_a_checkpoint_are_timed(
        self, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        to = ["--to", str(tmp_path), "--sections", "decode"]
        assert main(["latency", str(finished[0]), *to]) == 0
        rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
        assert {row["shape"] for row in rows} == {f"run.{part}" for part in ("qkv", "o", "gate_up", "down")}
        assert {row["of_copy"] for row in rows} == {None}  # copying was not asked for
        sizes = {
            shape.part: (shape.out_features, shape.in_features) for shape in shapes_of_checkpoint(str(finished[0]))
        }
        assert sizes["qkv"] == ((32, 16, 16), 32)
        assert sizes["down"] == ((32,), 44)

    def test_when_time_is_up_the_rest_is_listed(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--shapes", "64x128", "--to", str(tmp_path), "--minutes", "1e-6"]
        assert main(["latency", *arguments]) == 0
        stored = json.loads((tmp_path / "latency.json").read_text())
        assert stored["rows"] == []
        assert any("elastic at 4 bits (out of time)" in line for line in stored["not_measured"])
        assert "Not measured: decode given.64x128" in capsys.readouterr().out
        assert not (tmp_path / "latency.png").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--shapes", "llama2-7b"], "no shape 'llama2-7b'. Did you mean 'llama-2-7b'"),
            (["--shapes", "llama-2-7b.gateup"], "Did you mean 'llama-2-7b.gate_up'"),
            (["--shapes", "0x64"], "must be at least 1"),
            (["--sections", "decod"], "no section 'decod'. Did you mean 'decode'"),
            (["--sections", "prefill"], "prefill needs a CUDA device"),
            (["--minutes", "0"], "a number above 0"),
            (["some/run", "--shapes", "small"], "not both"),
            (["--tune"], "they need a CUDA device"),
            (["--warm-up"], "--warm-up needs a run"),
            (["--tune", "--warm-up"], "give one"),
            (["--sectionz", "decode"], "latency:"),
        ],
    )
    def test_what_cannot_be_timed_is_answered_in_a_line(
        self, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["latency", *arguments, "--to", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_warming_up_kernels_needs_a_gpu(self, finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["latency", str(finished[0]), "--warm_up"]) == 2
        assert "they need a CUDA device" in capsys.readouterr().err


class TestRun:
    """What `LatencyCheck` leaves behind."""

    def test_results_hold_the_speed_at_every_budget_and_the_path(self, finished: Run) -> None:
        latency = json.loads((finished[0] / "results.json").read_text())["latency"]
        assert latency["path"] == "reference"
        assert "says nothing of other devices" in latency["what"]
        assert [row["target_bits"] for row in latency["budgets"]] == [2.0, 2.5, 8.0]
        assert {shape["shape"]: shape["inputs"] for shape in latency["shapes"]} == {
            "qkv": 2,
            "o": 2,
            "gate_up": 2,
            "down": 2,
        }
        for budget in latency["budgets"]:
            assert min(budget[k] for k in ("us", "gb_per_s", "of_copy", "times_plain", "used_bits")) > 0
        ends = [row["tokens_per_second"] for row in latency["budgets"] if row["target_bits"] in (2, 8)]
        assert min(ends) > 0
        assert json.loads((finished[0] / "elastic" / "results.json").read_text())["latency"] == latency

    def test_loggers_get_a_point_per_budget(self, finished: Run) -> None:
        lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
        points = [line for line in lines if "latency/us" in line]
        assert len(points) == 3
        assert all("eval/bits" in point for point in points)
        steps = [line["step"] for line in lines if "eval/bits" in line]
        assert steps == sorted(steps)

    def test_the_policy_gets_a_curve(self, finished: Run) -> None:
        speed = json.loads((finished[0] / "elastic" / "speed.json").read_text())
        assert speed["environment"]["path"] == "reference"
        assert {2.0, 8.0} <= {row["bits"] for row in speed["rows"]}
        policy = BitsPolicy.from_checkpoint(finished[0], max_perplexity_ratio=100)
        assert policy.bits_for_speed(1e9) == policy.levels[-1].bits
        assert policy.saturated
        assert policy.bits_for_speed(1e-9) == policy.levels[0].bits

    def test_validate_measures_again_and_can_be_told_not_to(self, finished: Run, tmp_path: Path) -> None:
        run = shutil.copytree(finished[0], tmp_path / "copy")
        before = json.loads((run / "results.json").read_text())["latency"]
        arguments = ["--config", str(run / "config.yaml"), f"--trainer.default_root_dir={run}"]
        callback = "[{class_path: mobiq_lightning.callbacks.LatencyCheck, init_args: {seconds: %s}}]"
        assert main(["validate", *arguments, "--model.eval_bits=[3]", f"--trainer.callbacks={callback % 0}"]) == 0
        assert json.loads((run / "results.json").read_text())["latency"] == before
        assert main(["validate", *arguments, "--model.eval_bits=[2, 3.5]", f"--trainer.callbacks={callback % 1}"]) == 0
        after = json.loads((run / "results.json").read_text())
        assert [row["target_bits"] for row in after["latency"]["budgets"]] == [2, 2.5, 3, 3.5, 8]
        assert {2, 8} <= {row["bits"] for row in json.loads((run / "elastic" / "speed.json").read_text())["rows"]}
        depths = [row["bits"] for row in after["latency"]["shapes"][0]["depths"]]
        used = {row["target_bits"]: row["used_bits"] for row in after["latency"]["budgets"]}
        assert set(depths) == {depth for bits in used.values() for depth in neighbours(bits, (2, 3, 4, 6, 8))[:2]}

    def test_a_checkpoint_with_speeds_is_whole(self, finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", str(finished[0])]) == 0
        assert main(["inspect", str(finished[0])]) == 0
        assert "the reference path, 1 token" in capsys.readouterr().out

    def test_a_budget_lies_between_its_neighbouring_depths(self) -> None:
        depths = (2, 3, 4, 6, 8)
        assert neighbours(2.0, depths) == (2, 2, 0.0)
        assert neighbours(5.0, depths) == (4, 6, 0.5)
        assert neighbours(2.25, depths) == (2, 3, 0.25)


class TestDecodingStep:
    def test_the_step_decodes_what_generate_does(self, model: Any) -> None:
        """The timed loop must be decoding, not just work of the same shape."""
        ids = random_prompt(model, 1, 8)
        with model.bits(8.0):
            assert len(seconds_per_step(model, ids, 3, 2)) == 2
        assert model.bits_used().n_tokens == 8 + 3 + 3 * 2
        assert model.bits_used().code_bits == 8

    def test_speed_through_the_step_has_the_same_form(self, model: Any) -> None:
        rows = measure_speed(model, [2, 8], new_tokens=2, repeats=1, graphed=True)
        assert [row["used_bits"] for row in rows] == [2, 8]
        assert min(row["tokens_per_second"] for row in rows) > 0


class TestWarmUp:
    def test_on_the_reference_weights_of_all_depths_are_unpacked(self, finished: Run) -> None:
        model = load(finished[0], warm_up=True, bits=3.0)
        linears = [module for module in model.modules() if isinstance(module, ElasticLinear)]
        assert len(linears) == 2 * 7
        assert model.kept.n_bytes == 5 * sum(4 * linear.n_weights for linear in linears)  # at all depths, in float32
        assert model.budget == 3.0
        assert token_counts(model) == (1,)
        assert set(warm_up(model)) == {1}


@needs_cuda
class TestOnCuda:
    def test_the_whole_command_runs(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        names = "check,ceilings,decode,batch,prefill"
        assert main(["latency", "--shapes", "4096x4096", "--sections", names, "--to", str(tmp_path)]) == 0
        stored = json.loads((tmp_path / "latency.json").read_text())
        assert stored["path"] == "kernels"
        assert not [row for row in stored["rows"] if "error" in row]

    def test_a_model_of_kernels_is_decoded_through_one_graph(self, tmp_path: Path) -> None:
        from mobiq_lightning.latency.whole_model import ModelSize, model

        journal = quick(tmp_path, "kernels", torch.device("cuda", 0))
        model(journal, torch.bfloat16, ModelSize("small", 512, 1408, 2, 8, 1000, 16, 8, 2))
        assert [row["bits"] for row in journal.rows] == [16, 2, 4, 8]
        assert [row["used_bits"] for row in journal.rows[1:]] == [2, 4, 8]
