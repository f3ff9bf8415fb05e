"""What latencies are measured with: shapes, clocks and the journal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from mobiq_lightning import latency
from mobiq_lightning.errors import RecipeError
from mobiq_lightning.kernels import reference_linear
from mobiq_lightning.latency import Clock, sections
from mobiq_lightning.latency.command import chosen_sections, chosen_shapes
from mobiq_lightning.latency.journal import Candidate, Journal
from mobiq_lightning.latency.reference_products import ReferenceProducts
from mobiq_lightning.latency.shapes import MODELS, parse_shapes, widest
from mobiq_lightning.latency.timing import Call, Timing, copies_for, summary
from tests.latency.journals import CPU, TINY, quick


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


def test_unknown_shapes_are_refused_in_python_too() -> None:
    with pytest.raises(RecipeError, match="no shape 'huge'"):
        parse_shapes("huge")


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


MODULES = sorted(path.stem for path in Path(latency.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.e2e  # in a process of its own, which takes seconds to begin
def test_every_module_imports_and_the_reference_is_timed_without_triton(tmp_path: Path) -> None:
    code = "import sys, importlib; sys.modules['triton'] = None\n"
    code += "".join(f"importlib.import_module('mobiq_lightning.latency.{name}')\n" for name in MODULES)
    code += "from pathlib import Path; from mobiq_lightning.latency import measure\n"
    code += f"measure(shapes='64x128', names='decode', folder=Path({str(tmp_path)!r}))"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert {row["path"] for row in json.loads((tmp_path / "latency.json").read_text())["rows"]} == {"reference"}
