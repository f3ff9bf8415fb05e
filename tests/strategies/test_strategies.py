"""Every strategy found under strategies/ can be named; the contract of slice schemes. That of others: test_strategies_*.py."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mobiq_lightning import strategies
from mobiq_lightning.calibration.rates import Rates
from mobiq_lightning.packing import CODES, WHOLE_ROW, PackedWeight
from mobiq_lightning.strategies import (
    BlockReconstruction,
    ConstantBudget,
    ErrorSketchRouter,
    ExponentialBudget,
    LinearBudget,
    LogitDistillation,
    MLPRouter,
    ResidualSlices,
    SampledBudget,
    StepBudget,
    TrainableCodes,
)
from mobiq_lightning.strategies.base import BudgetSchedule, Objective, Router, SliceScheme
from mobiq_lightning.strategies.slices.ranges import learned_range
from mobiq_lightning.strategies.transform_base import Transform
from tests.strategies.kinds import subclasses, unexported

SLICE_BITS = [(2, 2, 2, 2), (2, 1, 1, 1, 1, 1, 1), (4, 2, 2), (1, 1, 1)]


@pytest.mark.parametrize(
    ("folder", "base"),
    [
        ("transforms", Transform),
        ("slices", SliceScheme),
        ("routers", Router),
        ("budgets", BudgetSchedule),
        ("objectives", Objective),
    ],
)
def test_a_recipe_may_call_every_strategy_by_its_short_name(folder: str, base: type) -> None:
    missing = unexported(folder, base)
    assert not missing, f"{missing} lie under strategies/, but strategies/{folder}/__init__.py does not export them"
    module = f"{strategies.__name__}.{folder}.forgotten"
    forgotten = type("Forgotten", (subclasses(base)[0],), {"__module__": module})
    assert unexported(folder, base) == ["Forgotten"]
    del forgotten  # no other test is to find it
    gc.collect()
    assert unexported(folder, base) == []


def test_every_strategy_is_exported_from_the_package() -> None:
    kinds = (Transform, SliceScheme, Router, BudgetSchedule, Objective)
    names = {c.__name__ for base in kinds for c in subclasses(base)}
    contracts = {"ObservesGains", "ObservesWeights", "ThresholdTask", "TrainableCodes"}
    bases = {"BlockRun", "InputTransform", *contracts, *(kind.__name__ for kind in kinds)}
    assert names == set(strategies.__all__) - bases


@pytest.mark.parametrize("slice_bits", SLICE_BITS)
@pytest.mark.parametrize("kind", subclasses(SliceScheme))
class TestSliceSchemes:
    def scheme(self, kind: Any, slice_bits: tuple[int, ...], group_size: int = 64) -> tuple[Any, torch.Tensor]:
        torch.manual_seed(0)
        scheme = kind(12, 172, slice_bits=slice_bits, group_size=group_size)  # 172 is no multiple of 64
        for parameter in scheme.parameters():
            torch.nn.init.uniform_(parameter, -0.3, 0.3)
        return scheme, torch.randn(12, 172)

    def test_slices_add_up_to_the_weight_at_every_depth(self, kind: Any, slice_bits: tuple[int, ...]) -> None:
        scheme, weight = self.scheme(kind, slice_bits)
        slices = scheme(weight)
        assert slices.shape == (len(slice_bits), 12, 172)
        for k in range(1, len(slice_bits) + 1):
            torch.testing.assert_close(slices[:k].sum(0), scheme.weight_at(weight, k), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("group_size", [64, WHOLE_ROW])
    def test_what_is_packed_is_what_was_trained_bit_by_bit(
        self, kind: Any, slice_bits: tuple[int, ...], group_size: int
    ) -> None:
        scheme, weight = self.scheme(kind, slice_bits, group_size)
        packed: PackedWeight = scheme.pack(weight)
        assert type(packed) is CODES[scheme.code]
        for name, value in packed.named_values.items():
            shapes = packed.value_shapes(12, 172, group_size, slice_bits)
            assert (value.dtype, tuple(value.shape)) == (torch.bfloat16, shapes[name])
        for k, depth in enumerate(scheme.depths, start=1):
            assert torch.equal(packed.weight_at(depth), scheme.weight_at(weight, k))
            assert torch.equal(packed.weight_at(depth), scheme.prefixes(weight)[k - 1])

    def test_every_slice_lowers_the_error(self, kind: Any, slice_bits: tuple[int, ...]) -> None:
        scheme = kind(12, 172, slice_bits=slice_bits)
        weight = torch.randn(12, 172)
        errors = [(scheme.weight_at(weight, k + 1) - weight).norm().item() for k in range(len(slice_bits))]
        assert errors == sorted(errors, reverse=True)
        added = sum(slice_bits) - slice_bits[0]
        # Half per bit where cells are cut in two; planes that are added one by one to frozen ones reach less far.
        bound = 0.85**added if kind is strategies.BinaryCodedSlices else 2 * 0.5**added
        assert errors[-1] < errors[0] * bound

    def test_gradients_reach_every_parameter(self, kind: Any, slice_bits: tuple[int, ...]) -> None:
        scheme, weight = self.scheme(kind, slice_bits)
        weight.requires_grad_()
        (scheme(weight) * torch.randn(len(slice_bits), 12, 172)).sum().backward()
        # Parameters of codes begin with their slice: test_progressive.py.
        codes = {id(p) for p in scheme.code_parameters()} if isinstance(scheme, TrainableCodes) else set()
        assert all(bool((p.grad != 0).any()) for p in scheme.parameters() if id(p) not in codes)
        assert bool((weight.grad != 0).any())

    def test_the_state_dict_restores_the_scheme(self, kind: Any, slice_bits: tuple[int, ...]) -> None:
        scheme, weight = self.scheme(kind, slice_bits)
        before = scheme(weight)
        other = kind(12, 172, slice_bits=slice_bits, group_size=64)
        other.load_state_dict(scheme.state_dict())
        assert torch.equal(other(weight.clone()), before)
        scheme.forget()
        for again in (scheme, copy.deepcopy(scheme), pickle.loads(pickle.dumps(scheme))):
            assert torch.equal(again(weight), before)

    def test_another_weight_is_read_as_itself(self, kind: Any, slice_bits: tuple[int, ...]) -> None:
        scheme, weight = self.scheme(kind, slice_bits)
        scheme(weight)
        fresh = self.scheme(kind, slice_bits)[0](-2 * weight)
        with torch.no_grad():
            assert torch.equal(scheme(-2 * weight), fresh)
            weight.mul_(-2)
            assert torch.equal(scheme(weight), fresh)

    @pytest.mark.parametrize("weight", [torch.zeros(12, 20), torch.full((12, 20), 0.3), torch.full((12, 20), -1e-20)])
    def test_groups_without_spread_stay_what_they_are(
        self, kind: Any, slice_bits: tuple[int, ...], weight: torch.Tensor
    ) -> None:
        read = kind(12, 20, slice_bits=slice_bits).pack(weight).weight_at(sum(slice_bits))
        torch.testing.assert_close(read, weight, rtol=2**-7, atol=1e-18)


def test_residual_slices_have_the_gradient_that_autograd_gives_straight_through() -> None:
    torch.manual_seed(1)
    scheme = strategies.ResidualSlices(6, 20, slice_bits=(2, 1, 1), group_size=8)
    for parameter in scheme.parameters():
        torch.nn.init.uniform_(parameter, -1, 0.5)
    weight, upstream = torch.randn(6, 20), torch.randn(3, 6, 20)
    (scheme.prefixes(weight) * upstream).sum().backward()

    def expand(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(8, dim=1)[:, :20]

    reference = copy.deepcopy(scheme)
    reference.zero_grad()
    scale, bias = learned_range(weight, reference.low_clip, reference.high_clip, 8)
    total = torch.zeros(())
    for grad, depth in zip(upstream, scheme.depths, strict=True):
        position = ((weight - expand(bias)) / expand(scale) + 0.5) * 2**depth
        inside = (position >= 0) & (position < 2**depth)
        through = position + (position.floor() - position).detach()
        cell = torch.where(inside, through, position.floor().clamp(0, 2**depth - 1).detach())
        total = total + (grad * (expand(bias) + expand(scale) * ((cell + 0.5) * 2.0**-depth - 0.5))).sum()
    total.backward()
    for ours, theirs in zip(scheme.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", subclasses(SliceScheme))
@pytest.mark.parametrize("bad", [[], [0, 2], [4, 4, 2]])
def test_impossible_slice_bits_are_refused(kind: Any, bad: list[int]) -> None:
    with pytest.raises(ValueError, match="slice_bits"):
        kind(4, 8, slice_bits=bad)
    with pytest.raises(ValueError, match="group_size"):
        kind(4, 8, group_size=0)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1, 10**400, True, "3"])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: ConstantBudget(n),
        lambda n: LinearBudget(start_bits=n),
        lambda n: ExponentialBudget(rate=n),
        lambda n: SampledBudget(high_bits=n),
        lambda n: StepBudget(steps=n),
        lambda n: BlockReconstruction(depth_weights={2: n}),
        lambda n: BlockReconstruction(routed_weight=n),
        lambda n: LogitDistillation(label_weight=n),
        lambda n: ResidualSlices(8, 8, group_size=n),
        lambda n: MLPRouter(8, 3, hidden_features=n),
        lambda n: ErrorSketchRouter(8, 3, n_projections=n),
        lambda n: Rates(ranges=n),
    ],
)
def test_a_number_that_cannot_be_used_is_refused_with_its_name(make: Callable[[Any], Any], number: Any) -> None:
    with pytest.raises(ValueError, match=r"^[a-z_.]+(\[2\])? \(.*\) must be a number (of at least|above) ") as raised:
        make(number)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("slice_bits", [[], [2] * 10**5, [2, 0], [2, 1.5], [2**40], [2, True]])
def test_slices_that_cannot_be_are_refused_in_a_line(slice_bits: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"^slice_bits \(") as raised:
        ResidualSlices(8, 8, slice_bits=slice_bits)
    assert len(str(raised.value)) < 200
