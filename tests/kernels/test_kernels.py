"""Every kernel against float64, on awkward sizes: interpreted on a CPU, for real where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mobiq_lightning.errors import KernelError
from mobiq_lightning.kernels import relay, restore, sliced_linear
from mobiq_lightning.kernels.form import Form, Prepared
from mobiq_lightning.kernels.layout import KernelWeights, column_map
from mobiq_lightning.kernels.routing import Routing, TwoLayerWeights, relay_router
from mobiq_lightning.kernels.tuning import DecodeConfig, table_for, table_json
from mobiq_lightning.packing import PackedSlices, n_groups, pack_planes
from mobiq_lightning.strategies import MLPRouter
from mobiq_lightning.strategies.thresholds import prefix_scores

pytest.importorskip("triton")

from mobiq_lightning.kernels.decode import decode
from mobiq_lightning.kernels.dequantize import dequantize, dequantized_product
from mobiq_lightning.kernels.dispatch import INTERPRETED, multiply, path_for
from mobiq_lightning.kernels.grouped import grouped, plan_tiles
from mobiq_lightning.kernels.prepare import prepare

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
TOLERANCE = 2e-6 if INTERPRETED else 1e-4  # tensor cores truncate sums; results are asked for in float32
PROCESSORS = 4
FINE, COARSE, SINGLE = (2, 1, 1, 2, 2), (2, 2, 2, 2), (1, 1, 1)
SIZES = [(64, 128, 128), (100, 257, 64), (72, 130, 32), (80, 300, 48), (136, 390, 256)]
"""Rows, columns, group size."""


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Whatever `torch.empty` gives is NaN, so that a result that was not written, or a partial sum that was not, shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def make(rows: int, columns: int, group: int, slice_bits: tuple[int, ...], seed: int = 0) -> PackedSlices:
    generator = torch.Generator().manual_seed(seed)
    n_bits = sum(slice_bits)
    codes = torch.randint(0, 2**n_bits, (rows, columns), generator=generator, dtype=torch.int32).to(torch.uint8)
    shape = (rows, n_groups(columns, group))
    scale = torch.rand(shape, generator=generator).to(torch.bfloat16)
    bias = (torch.randn(shape, generator=generator) * 0.1).to(torch.bfloat16)
    return PackedSlices(
        tuple(plane.to(DEVICE) for plane in pack_planes(codes, n_bits)),
        (scale.to(DEVICE), bias.to(DEVICE)),
        columns,
        group,
        slice_bits,
    )


def pair(size: tuple[int, int, int], slice_bits: tuple[int, ...]) -> tuple[list[PackedSlices], KernelWeights]:
    """Two linears of one input."""
    rows, columns, group = size
    packed = [make(rows, columns, group, slice_bits, 1), make(rows // 2, columns, group, slice_bits, 2)]
    return packed, relay(packed)


def tokens(count: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=generator).to(DEVICE, DTYPE)


def depths_for(count: int, depths: tuple[int, ...]) -> list[Tensor]:
    """All tokens at each depth, and a mix."""
    mixed = torch.tensor(depths)[torch.randint(0, len(depths), (count,), generator=torch.Generator().manual_seed(3))]
    return [*(torch.full((count,), d) for d in depths), mixed]


def prepared(x: Tensor, weights: KernelWeights, bits: Tensor) -> Prepared:
    capability = (9, 0) if INTERPRETED else torch.cuda.get_device_capability()
    form = Form.of(len(x), DTYPE, capability, INTERPRETED)
    return prepare(x, weights, form, bits.int().to(DEVICE))[1]


def check(y: Tensor, x: Tensor, bits: Tensor, packed: list[PackedSlices], weights: KernelWeights) -> None:
    for linear, start in zip(packed, weights.row_starts, strict=True):
        plain = {int(d): linear.weight_at(int(d)).double() for d in bits.unique()}
        wanted = torch.stack([plain[int(d)] @ token.double() for d, token in zip(bits, x, strict=True)])
        found = y[:, start : start + linear.out_features].double()
        error = float((found - wanted).norm() / wanted.norm())
        assert error < TOLERANCE, (bits.tolist(), error)


@pytest.mark.parametrize("slice_bits", [FINE, COARSE, SINGLE])
@pytest.mark.parametrize("size", [*SIZES, (40, 200, 16), (5, 7, 100)])
def test_saved_weights_come_back_from_the_kernels_order_bit_by_bit(
    size: tuple[int, int, int], slice_bits: tuple[int, ...]
) -> None:
    packed, weights = pair(size, slice_bits)
    for index, linear in enumerate(packed):
        back = restore(weights, index)
        assert all(torch.equal(a, b) for a, b in zip(back.planes, linear.planes, strict=True))
        assert torch.equal(back.scale, linear.scale)
        assert torch.equal(back.bias, linear.bias)


def test_linears_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="group_size"):
        relay([make(64, 128, 128, FINE), make(64, 128, 64, FINE)])


@pytest.mark.parametrize("slice_bits", [FINE, SINGLE])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 17])
def test_decode_gives_every_token_its_own_depth(
    size: tuple[int, int, int], slice_bits: tuple[int, ...], count: int
) -> None:
    packed, weights = pair(size, slice_bits)
    x = tokens(count, size[1])
    *uniform, mixed = depths_for(count, weights.depths)
    configs = (DecodeConfig(64, 1, 3, 1), DecodeConfig(128, 2, 3, 6))
    # A mix meets both configurations at every size, and each depth alone both of them over the sizes.
    alternating = [(bits, configs[number % 2]) for number, bits in enumerate(uniform, SIZES.index(size))]
    for bits, config in (*alternating, *((mixed, config) for config in configs)):
        y = decode(prepared(x, weights, bits), weights, config, PROCESSORS, dtype=torch.float32)
        check(y, x, bits, packed, weights)
        assert not weights.counters.any(), "counters must be ready for the next launch"


def test_decode_of_64_tokens_with_many_splits() -> None:
    packed, weights = pair((72, 650, 128), FINE)
    x = tokens(64, 650)
    bits = depths_for(64, weights.depths)[-1]
    config = DecodeConfig(128, 1, 3, 64)
    y = decode(prepared(x, weights, bits), weights, config, PROCESSORS, dtype=torch.float32)
    check(y, x, bits, packed, weights)


def test_decode_of_one_linear_alone_is_that_part_of_the_whole() -> None:
    packed, weights = pair((136, 300, 64), FINE)
    x = tokens(3, 300)
    bits = torch.tensor([2, 3, 8])
    whole = multiply(x, weights, bits.to(DEVICE))
    for index, linear in enumerate(packed):
        start = weights.row_starts[index]
        part = multiply(x, weights, bits.to(DEVICE), index)
        assert torch.equal(part[:, : linear.out_features], whole[:, start : start + linear.out_features])


def test_split_sums_are_added_in_the_same_order_every_time() -> None:
    _, weights = pair((72, 650, 128), FINE)
    x = tokens(7, 650)
    made = prepared(x, weights, depths_for(7, weights.depths)[-1])
    config = DecodeConfig(64, 1, 3, 64)
    first = decode(made, weights, config, PROCESSORS)
    assert all(torch.equal(first, decode(made, weights, config, PROCESSORS)) for _ in range(3))


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_units_that_no_token_needs_are_not_read(bits: int) -> None:
    _, weights = pair((72, 300, 64), FINE)
    x = tokens(3, 300)
    depth = torch.full((3,), bits)
    config = DecodeConfig(64, 1, 3, 1)
    before = decode(prepared(x, weights, depth), weights, config, PROCESSORS)
    grouped_before = grouped(prepared(x, weights, depth), weights)
    weights.units[-(-bits // 2) :] = -1
    assert torch.equal(before, decode(prepared(x, weights, depth), weights, config, PROCESSORS))
    assert torch.equal(grouped_before, grouped(prepared(x, weights, depth), weights))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_bytes_read_are_whole_units_scales_and_biases(bits: int) -> None:
    weights = relay([make(256, 512, 128, FINE)])
    assert weights.bytes_read(bits) == 256 * 512 * {2: 2, 3: 4, 4: 4, 6: 6, 8: 8}[bits] // 8 + 256 * 4 * 4


@pytest.mark.parametrize("slice_bits", [FINE, SINGLE])
@pytest.mark.parametrize("size", SIZES)
def test_grouped_gives_every_token_its_own_depth(size: tuple[int, int, int], slice_bits: tuple[int, ...]) -> None:
    packed, weights = pair(size, slice_bits)
    x = tokens(33, size[1])
    *_, deepest, mixed = depths_for(33, weights.depths)
    assert set(mixed.tolist()) == {*weights.depths}, "a tile holds one depth: the mix needs all of them"
    for bits in (deepest, mixed):  # several tiles of one depth, and a tile of each
        y = grouped(prepared(x, weights, bits), weights, dtype=torch.float32, block=16 if INTERPRETED else 64)
        check(y, x, bits, packed, weights)


def test_tiles_hold_every_token_once_and_one_depth_each() -> None:
    bits = depths_for(200, (2, 3, 4, 6, 8))[-1].int()
    plan = plan_tiles(bits, 5, 16)
    seen = []
    for depth, start, count in zip(plan.depth, plan.start, plan.count, strict=True):
        taken = plan.order[start : start + count].tolist()
        assert all(bits[t] == depth for t in taken)
        seen += taken
    assert sorted(seen) == list(range(200))


@pytest.mark.parametrize("slice_bits", [FINE, COARSE, SINGLE])
@pytest.mark.parametrize("size", SIZES)
def test_dequantized_weights_equal_the_saved_ones_bit_by_bit(
    size: tuple[int, int, int], slice_bits: tuple[int, ...]
) -> None:
    packed, weights = pair(size, slice_bits)
    for depth in weights.depths:
        plain = dequantize(weights, depth, torch.float32)
        for linear, start in zip(packed, weights.row_starts, strict=True):
            assert torch.equal(plain[start : start + linear.out_features], linear.weight_at(depth))


def test_dequantized_product_gives_every_token_its_own_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobiq_lightning.kernels.dequantize.WORKSPACE_BYTES", 1)  # a row block at a time
    packed, weights = pair((136, 520, 64), FINE)
    x = tokens(70, 520)
    bits = depths_for(70, weights.depths)[-1]
    y = dequantized_product(x, weights, plan_tiles(bits.int().to(DEVICE), 5, 64))
    for linear, start in zip(packed, weights.row_starts, strict=True):
        wanted = sliced_linear(x, linear, bits.to(DEVICE))
        torch.testing.assert_close(y[:, start : start + linear.out_features], wanted, rtol=1e-2, atol=1e-3)


def test_which_kernel_multiplies_depends_on_the_number_of_tokens_alone() -> None:
    weights = relay([make(64, 128, 128, FINE)])
    until = table_for("interpreter" if INTERPRETED else torch.cuda.get_device_name()).grouped_until
    paths = {count: path_for(count, weights, DTYPE) for count in (1, 64, 65, until, until + 1)}
    assert paths == {1: "decode", 64: "decode", 65: "grouped", until: "grouped", until + 1: "dequantize"}
    assert until >= 65, "the test needs a table that uses all three"
    # Products of several depths at once want bfloat16 where they are cuBLAS's; of one depth, any dtype does.
    assert path_for(until + 1, weights, torch.float16) == ("dequantize" if INTERPRETED else "grouped")
    assert path_for(until + 1, weights, None) == "dequantize"


@pytest.mark.interpreter  # which is imported on the way
@pytest.mark.parametrize("count", [0, 1, 64, 65, 600])
def test_the_public_function_agrees_with_the_reference(count: int) -> None:
    packed, weights = pair((100, 256, 64), FINE)
    x = tokens(count, 256)
    bits = depths_for(count, weights.depths)[-1].to(DEVICE)
    wanted = torch.cat([sliced_linear(x, linear, bits) for linear in packed], dim=1)
    torch.testing.assert_close(
        sliced_linear(x, weights, bits), wanted, rtol=1e-2, atol=0.05 if not INTERPRETED else 1e-3
    )


def routing_for(
    router: MLPRouter, weights: KernelWeights, thresholds: Tensor, valid: Tensor
) -> tuple[Routing, MLPRouter]:
    relaid = relay_router(TwoLayerWeights(*router.two_layers()), weights)
    counts = [torch.zeros(len(thresholds), dtype=torch.int64, device=DEVICE) for _ in range(2)]
    return Routing(relaid, thresholds.to(DEVICE), *counts, valid.to(DEVICE)), router


@pytest.mark.parametrize("mode", ["plain", "norm", "gated"])
@pytest.mark.parametrize("size", [(64, 520, 64), (40, 200, 48)])
def test_one_launch_norms_routes_and_counts_as_the_modules_do(mode: str, size: tuple[int, int, int]) -> None:
    _, weights = pair(size, FINE)
    columns = size[1]
    torch.manual_seed(0)
    router = MLPRouter(columns, len(FINE), hidden_features=5).to(DEVICE).requires_grad_(False)
    router.score.weight.mul_(50)
    x, up, norm = tokens(12, columns, 1), tokens(12, columns, 2), torch.rand(columns).to(DEVICE, DTYPE)
    settings: dict[str, object] = {}
    wanted = x
    if mode == "norm":
        settings["norm"] = (norm, 1e-5)
        wanted = norm * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).to(DTYPE)
    if mode == "gated":
        settings["up"] = up
        wanted = torch.nn.functional.silu(x) * up
    thresholds = torch.tensor([-3.0, 0.0])  # the first six tokens read deeper than the others
    valid = torch.tensor([1, 0] * 6)
    routing, _ = routing_for(router, weights, thresholds, valid)
    form = Form.of(12, DTYPE, (9, 0), INTERPRETED)
    y, made = prepare(x, weights, form, None, routing, **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(y, wanted)

    scores = prefix_scores(router.scores(y.float()))
    above = scores - thresholds.repeat_interleave(6).to(DEVICE)[:, None]
    clear = (above.abs() > 1e-4).all(1)  # rounding may turn a decision at the very threshold
    bits = 2 + ((above > 0).float() @ torch.tensor([1.0, 1, 2, 2], device=DEVICE)).int()
    assert clear.sum() > 8
    assert len(bits.unique()) > 2, "the test needs tokens of several depths"
    assert torch.equal(made.bits[clear], bits[clear])
    assert routing.bits_read.tolist() == (made.bits.cpu() * valid).view(2, 6).sum(1).tolist()
    assert routing.tokens_read.tolist() == [3, 3]
    odd = sum(1 << unit for unit in range(4) if (made.bits == 2 * unit + 1).any())
    assert made.info.tolist() == [int(made.bits.min()), int(made.bits.max()), odd]
    assert not routing.router.counters.any(), "counters must be ready for the next launch"
    given = prepare(y, weights, form, made.bits)[1]
    for name in ("one", "two", "sums", "info"):
        torch.testing.assert_close(getattr(made, name), getattr(given, name))


@pytest.mark.parametrize(
    ("row", "column", "tile", "word", "bit"),
    [(0, 0, 0, 0, 0), (9, 21, 0, 26, 20), (5, 64, 0, 5 * 16 + 1, 0), (17, 255, 1, 128 + (1 * 4 + 3) * 4 + 1, 30)],
)
def test_a_code_lies_where_the_layout_says(row: int, column: int, tile: int, word: int, bit: int) -> None:
    """The formula of `layout`, and the example of the kernels' README."""
    codes = torch.zeros(32, 256, dtype=torch.uint8)
    codes[row, column] = 0b1001
    values = torch.zeros(32, 2, dtype=torch.bfloat16)
    units = relay([PackedSlices(tuple(pack_planes(codes, 4)), (values, values), 256, 128, (2, 2))]).units
    for unit, code in ((0, 0b10), (1, 0b01)):
        found = units[unit].nonzero().tolist()
        assert found == [[tile, word]]
        assert int(units[unit, tile, word]) & 0xFFFFFFFF == code << bit


def test_columns_of_padded_groups_are_empty() -> None:
    weights = relay([make(64, 100, 48, FINE)])
    source = column_map(weights)
    assert source[source >= 0].tolist() == list(range(100))
    assert (source[48:64] == -1).all()


def test_subnormal_bfloat16_numbers_are_evenly_spaced() -> None:
    """What the kernels' unpacking stands on."""
    values = torch.arange(256, dtype=torch.int16).view(torch.bfloat16).double()
    assert torch.equal(values, torch.arange(256).double() * 2.0**-133)
    values = torch.arange(256, dtype=torch.int16).view(torch.float16).double()
    assert torch.equal(values, torch.arange(256).double() * 2.0**-24)


def test_a_table_of_ones_own_is_found_by_the_name_of_the_gpu(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    import json
    from pathlib import Path

    folder = Path(str(tmp_path))
    config = DecodeConfig(64, 2, 3, 5)
    stored = table_json({"8": config, "8:22016:4096": DecodeConfig()}, 300, {"date": "today"})
    (folder / "some-gpu-9000.json").write_text(json.dumps(stored))
    monkeypatch.setenv("MOBIQ_TUNED", str(folder))
    table_for.cache_clear()
    table = table_for("Some GPU 9000")
    assert table.decode_config(8, 4096, 4096) == config
    assert table.decode_config(8, 22016, 4096) == DecodeConfig()
    assert table.grouped_until == 300
    assert table_for("another").source == "default.json"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"decode": {"1": {"x": 1}}, "grouped_until": 3}', '{"decode": 3}']
)
def test_a_damaged_table_of_a_gpu_is_refused_by_name(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some-gpu-9001.json").write_text(content)
    monkeypatch.setenv("MOBIQ_TUNED", str(tmp_path))
    with pytest.raises(KernelError, match=r"some-gpu-9001\.json is no table of `latency --tune`"):
        table_for("Some GPU 9001")
