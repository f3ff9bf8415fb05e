"""The code around the kernels, on Triton's interpreter where there is no GPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mobiq_lightning.errors import KernelError
from mobiq_lightning.latency import Clock, sections
from mobiq_lightning.latency.shapes import Shape
from tests.latency.journals import CPU, TINY, quick


class TestKernels:
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
