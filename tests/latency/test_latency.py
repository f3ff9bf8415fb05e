"""The latency command, what it measures with, and the speeds that a run leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mobiq_lightning import BitsPolicy, latency, load
from mobiq_lightning.cli import main
from mobiq_lightning.errors import KernelError, RecipeError
from mobiq_lightning.kernels import reference_linear
from mobiq_lightning.latency import Clock, sections
from mobiq_lightning.latency.command import chosen_sections, chosen_shapes
from mobiq_lightning.latency.journal import Candidate, Journal
from mobiq_lightning.latency.of_model import neighbours
from mobiq_lightning.latency.reference_products import ReferenceProducts
from mobiq_lightning.latency.shapes import MODELS, Shape, parse_shapes, shapes_of_checkpoint, widest
from mobiq_lightning.latency.timing import Call, Timing, copies_for, summary
from mobiq_lightning.runtime import warm_up
from mobiq_lightning.runtime.warming import token_counts
from mobiq_lightning.serving import measure_speed, random_prompt, seconds_per_step
from tests.conftest import Run

CPU = torch.device("cpu")
TINY = Shape("tiny", "gate_up", (48, 80), 200, group_size=64)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")


def quick(folder: Path, path: str, device: torch.device = CPU) -> Journal:
    head = {"what": path, "environment": {"device": "here"}}
    clock = Clock(device, repeats=3, seconds=0.003)
    return Journal(folder, path, head, clock, time.monotonic() + 600, copy_bytes_per_s=1e10)


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
            (["--minutes", "0"], "must be above 0"),
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


class TestShapes:
    def test_known_models_have_the_products_of_a_block(self) -> None:
        by_name = {shape.name: shape for shapes in MODELS.values() for shape in shapes}
        assert (by_name["llama-2-7b.qkv"].rows, by_name["llama-2-7b.qkv"].in_features) == (12288, 4096)
        assert (by_name["llama-3-8b.gate_up"].rows, by_name["llama-3-8b.gate_up"].in_features) == (28672, 4096)
        assert by_name["llama-3-70b.qkv"].out_features == (8192, 1024, 1024)
        assert sum(shape.n_weights for shape in MODELS["llama-2-7b"]) * 32 == 6_476_005_376

    def test_models_parts_and_sizes_can_be_given(self) -> None:
        names = [shape.name for shape in parse_shapes("llama-3-8b.down, 100x257,small")]
        assert names[:2] == ["llama-3-8b.down", "given.100x257"]
        assert len(names) == 6
        assert widest(parse_shapes("small")).part == "gate_up"
        assert widest(parse_shapes("10x10,20x20")).part == "20x20"

    def test_each_path_has_shapes_and_sections_of_its_own(self) -> None:
        assert {shape.model for shape in chosen_shapes("", "", "reference")} == {"small"}
        assert {shape.model for shape in chosen_shapes("", "", "kernels")} == {
            "llama-2-7b",
            "llama-3-8b",
            "llama-3-70b",
        }
        assert chosen_sections("", "kernels") == ["check", "ceilings", "decode", "batch", "prefill", "model"]
        assert chosen_sections("batch,ceilings", "reference") == ["ceilings", "batch"]


class TestTiming:
    def test_median_and_spread(self) -> None:
        timing = summary([10.0, 12.0, 11.0, 30.0, 10.0])
        assert (timing.us, timing.repeats) == (11.0, 5)
        assert timing.spread == pytest.approx(2 / 11)

    def test_weights_are_rotated_over_more_than_any_cache(self) -> None:
        assert copies_for(25_000_000, 60_000_000) * 25_000_000 > 3 * 60_000_000
        assert copies_for(10**9, 60_000_000) == 2
        assert copies_for(1, 60_000_000) == 64

    def test_all_calls_are_made_equally_often(self) -> None:
        made = [0, 0, 0]

        def call(which: int) -> None:
            made[which] += 1

        Clock(CPU, repeats=3, seconds=0.001).time([partial(call, which) for which in range(3)])
        assert made[0] - 1 == made[1] == made[2]  # the first one more, to see how long it takes


class ScriptedClock(Clock):
    """A clock on which every product takes a microsecond longer than the one before."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.asked = 0

    def time(self, calls: Sequence[Call], launches: int = 64) -> Timing:
        self.asked += 1
        return Timing(10.0 + self.asked, self.asked / 64, 3)


class TestJournal:
    def test_rows_hold_what_the_clock_says_and_noise_is_how_far_the_first_product_is_off_when_timed_again(
        self, tmp_path: Path
    ) -> None:
        clock = ScriptedClock()
        journal = Journal(tmp_path, "reference", {}, clock, time.monotonic() + 600, copy_bytes_per_s=1e10)
        sections.decode(journal, ReferenceProducts(CPU), [TINY])
        assert [(row["us"], row["spread"]) for row in journal.rows] == [
            (10.0 + number, number / 64) for number in range(1, len(journal.rows) + 1)
        ]
        assert (journal.rows[1]["product"], journal.rows[1]["bits"]) == ("elastic", 2)
        assert clock.asked == len(journal.rows) + 1
        again = 10.0 + clock.asked
        assert journal.head["noise"]["share"] == pytest.approx(again / 12 - 1)

    def test_every_row_is_on_disk_before_the_next_is_measured(self, tmp_path: Path) -> None:
        journal, seen = quick(tmp_path, "reference"), []

        def make(number: int) -> Candidate:
            path = tmp_path / "latency.json"
            seen.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
            return Candidate("plain" if number == 0 else "elastic", number, 1000, [lambda: torch.ones(100).sum()])

        for number in range(3):
            journal.measure("decode", TINY, 1, partial(make, number), "label")
        assert seen == [0, 1, 2]
        assert ["times_plain" in row for row in journal.rows] == [False, True, True]

    def test_one_that_fails_is_a_row_with_its_error(self, tmp_path: Path) -> None:
        journal = quick(tmp_path, "reference")

        def make() -> Candidate:
            raise ValueError("out of registers")

        journal.measure("decode", TINY, 1, make, "elastic at 2 bits")
        assert journal.rows[0]["error"] == "ValueError: out of registers"
        assert journal.rows[0]["product"] == "elastic at 2 bits"

    def test_the_reference_products_are_those_of_the_reference(self) -> None:
        products = ReferenceProducts(CPU)
        x, bits = products.tokens(TINY, 5), [2, 3, 4, 6, 8]
        candidate = products.elastic(TINY, x, bits)
        wanted = reference_linear(x, products.packed(TINY), torch.tensor(bits))
        assert all(torch.equal(call(), wanted) for call in candidate.calls)  # type: ignore[arg-type]
        assert candidate.bits == "mixed"
        assert candidate.n_bytes == 5 * TINY.n_weights * 4
        unpacked = dict(products.others(TINY, x[:1]))["unpacked at 2 bits"]()
        assert unpacked.n_bytes == 2 * 128 * 25 + 2 * 128 * 4 * 2


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
        assert [row["target_bits"] for row in after["latency"]["budgets"]] == [2, 3.5]
        assert {row["bits"] for row in json.loads((run / "elastic" / "speed.json").read_text())["rows"]} == {2, 3.5}
        depths = [row["bits"] for row in after["latency"]["shapes"][0]["depths"]]
        used = next(row["used_bits"] for row in after["latency"]["budgets"] if row["target_bits"] == 3.5)
        assert set(depths) == {2, *neighbours(used, (2, 3, 4, 6, 8))[:2]}

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
        linears = 2 * 7
        assert len(model.kept._kept) == 5 * linears
        assert model.budget == 3.0
        assert token_counts(model) == (1,)
        assert set(warm_up(model)) == {1}


class TestKernels:
    """The code around the kernels, on Triton's interpreter where there is no GPU."""

    @pytest.fixture
    def products(self) -> Any:
        pytest.importorskip("triton")
        from mobiq_lightning.latency.kernel_products import KernelProducts

        if torch.cuda.is_available():
            return KernelProducts(torch.device("cuda", 0))
        return KernelProducts(CPU, torch.float32)

    def test_random_weights_have_the_form_of_real_ones(self, products: Any) -> None:
        from mobiq_lightning.kernels import relay
        from mobiq_lightning.latency.reference_products import random_slices

        made = products.weights(TINY)
        real = relay([random_slices(TINY, rows, products.device, products.generator) for rows in TINY.out_features])
        for name in ("units", "meta", "counters"):
            assert getattr(made[0], name).shape == getattr(real, name).shape
            assert getattr(made[0], name).dtype == getattr(real, name).dtype
        assert made[0].row_starts == real.row_starts
        assert not torch.equal(made[0].units, made[1].units)
        assert not int(made[0].counters.sum())
        assert bool(torch.isfinite((made[0].meta << 16).view(torch.float32)).all())

    def test_sections_time_the_kernels(self, products: Any, tmp_path: Path) -> None:
        from mobiq_lightning.latency.prefill import prefill

        shape = Shape("tiny", "gate_up", (64,), 128, slice_bits=(2, 2))
        journal = quick(tmp_path, "kernels", products.device)
        sections.decode(journal, products, [shape])
        prefill(journal, products, [shape], counts=[6])
        assert not [row for row in journal.rows if "error" in row]
        by_product = {(r["section"], r["product"], r["bits"]): r for r in journal.rows}
        wanted = {("decode", "elastic", 2), ("decode", "elastic", 4), ("decode", "preparation", 0)}
        wanted |= {("prefill", p, b) for p in ("grouped", "dequantized") for b in (2, 4, "mixed")}
        assert wanted <= set(by_product)
        weights = products.weights(shape)[0]
        assert by_product["decode", "elastic", 2]["bytes"] == weights.bytes_read(2) < weights.bytes_read(4)
        assert "noise" in journal.head

    def test_an_odd_depth_is_counted_with_the_unit_that_it_reads(self, products: Any) -> None:
        x = products.tokens(TINY, 1)
        traffic = {depth: products.elastic(TINY, x, [depth]).n_bytes for depth in TINY.depths}
        assert traffic[2] < traffic[3] == traffic[4] < traffic[6] < traffic[8]

    def test_the_check_finds_a_wrong_kernel(self, products: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from mobiq_lightning.latency import check

        monkeypatch.setattr(check, "SIZES", ((64, 130, 64),))
        monkeypatch.setattr(check, "TOKENS", (1, 9))
        worst = check.check_kernels(products.device, products.dtype)
        assert set(worst) == {"decode", "grouped", "dequantize"}
        assert max(worst.values()) < check.TOLERANCE
        right = check.exact_product
        monkeypatch.setattr(check, "exact_product", lambda *a: right(*a) * 1.01)
        with pytest.raises(
            KernelError, match="the kernel decode is wrong on this device: 64x130, groups of 64, 1 tokens"
        ):
            check.check_kernels(products.device, products.dtype)

    def test_a_table_holds_the_best_configuration_and_those_that_beat_it_somewhere(self) -> None:
        pytest.importorskip("triton")
        from mobiq_lightning.kernels.tuning import DecodeConfig
        from mobiq_lightning.latency.tune import choose

        a, b, c = DecodeConfig(128), DecodeConfig(64), DecodeConfig(64, 2)
        other = Shape("tiny", "down", (100,), 64)
        us = {TINY: {a: 10.0, b: 12.0}, other: {a: 10.0, b: 9.9, c: 5.0}}
        assert choose(8, us) == {"8": a, "8:128:64": c}
        with pytest.raises(KernelError, match="no configuration was measured at 8 tokens"):
            choose(8, {TINY: {}})

    def test_tuning_writes_what_the_kernels_read(
        self, products: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mobiq_lightning.kernels import tuning
        from mobiq_lightning.latency import tune

        monkeypatch.setattr(tune, "candidates", lambda tokens: [tuning.DecodeConfig(128, 1, 3, 1)])
        shape = Shape("tiny", "o", (64,), 128, slice_bits=(2, 2))
        clock = Clock(products.device, repeats=3, seconds=0.001)
        table = tune.tuned_table(products, [shape], clock, 4, time.monotonic() + 600, counts=[8], many=[66])
        (tmp_path / f"{tuning.file_name('A New GPU')}.json").write_text(json.dumps(table))
        monkeypatch.setenv(tuning.TUNED_FOLDER, str(tmp_path))
        found = tuning.table_for("A New GPU")
        assert found.decode_config(8, 64, 128) == tuning.DecodeConfig(128, 1, 3, 1)
        assert found.grouped_until in (64, 66)
        assert table["measured"]["shapes"] == ["tiny.o"]


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


def test_unknown_shapes_are_refused_in_python_too() -> None:
    with pytest.raises(RecipeError, match="no shape 'huge'"):
        parse_shapes("huge")


MODULES = sorted(path.stem for path in Path(latency.__file__).parent.glob("*.py") if path.stem != "__init__")


def test_every_module_imports_and_the_reference_is_timed_without_triton(tmp_path: Path) -> None:
    code = "import sys, importlib; sys.modules['triton'] = None\n"
    code += "".join(f"importlib.import_module('mobiq_lightning.latency.{name}')\n" for name in MODULES)
    code += "from pathlib import Path; from mobiq_lightning.latency import measure\n"
    code += f"measure(shapes='64x128', names='decode', folder=Path({str(tmp_path)!r}))"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert {row["path"] for row in json.loads((tmp_path / "latency.json").read_text())["rows"]} == {"reference"}
