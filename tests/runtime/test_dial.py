"""The dial: budgets to thresholds, and counting what was read."""

from __future__ import annotations

import pickle
import threading
import time
from typing import Any

import pytest
import torch
from torch import nn

from mobiq_lightning.calibration.guarding import nested_allocation
from mobiq_lightning.errors import BitsError
from mobiq_lightning.nn import ElasticLinear, RoutedInput, held_slices
from mobiq_lightning.runtime import Dial
from mobiq_lightning.strategies import MLPRouter, ResidualSlices, ThresholdTask
from mobiq_lightning.strategies.thresholds import average_bits, falling, prefix_scores

BITS = (2, 1, 1, 2, 2)


def elastic_linear(seed: int, max_bits: int | None = None) -> ElasticLinear:
    """A linear of 24 x 40 weights with an input of its own, whose tokens get different scores."""
    torch.manual_seed(seed)
    weight = torch.randn(24, 40)
    routed = RoutedInput(MLPRouter(40, len(BITS)), BITS, weight.numel(), max_bits, budget_step=0.25)
    with torch.no_grad():
        routed.router.score.weight.mul_(100)  # type: ignore[union-attr,operator]
    table = torch.linspace(1, -5, 25).expand(5, -1)
    routed.set_tables(table, torch.zeros(5, 25))
    packed = ResidualSlices(24, 40, BITS, group_size=8).pack(weight)
    elastic = ElasticLinear(40, 24, BITS, 8, bias=False, max_bits=max_bits)
    held = packed.planes[: max_bits or 8]
    elastic.load_state_dict(
        {f"plane_{p}": plane for p, plane in enumerate(held)} | {"slice_scale": packed.scale, "slice_bias": packed.bias}
    )
    elastic.attach(routed, carries_input=True)
    return elastic.eval()


@pytest.fixture
def linears() -> list[ElasticLinear]:
    return [elastic_linear(0), elastic_linear(1)]


@pytest.fixture
def dial(linears: list[ElasticLinear]) -> Dial:
    return Dial([linear.routed for linear in linears], overhead_bits=0.5, router_bits=0.25)


def thresholds(dial: Dial) -> list[float]:
    return [float(routed.router.threshold) for routed in dial.inputs]


def read(linears: list[ElasticLinear], x: torch.Tensor) -> None:
    with torch.no_grad():
        for linear in linears:
            linear(x)


class TestTurning:
    def test_all_is_closed_at_the_lowest_and_open_at_the_highest_bits(self, dial: Dial) -> None:
        dial.set_bits(2.0)
        assert thresholds(dial) == [torch.inf, torch.inf]
        dial.set_bits(8)
        assert thresholds(dial) == [-torch.inf, -torch.inf]

    def test_between_two_stored_budgets_some_inputs_are_at_each(self, dial: Dial) -> None:
        dial.set_bits(5.0)
        assert thresholds(dial) == pytest.approx([-2.0, -2.0])
        dial.set_bits(5.125)
        assert thresholds(dial) == pytest.approx([-2.25, -2.0])
        dial.set_bits(5.1875)
        assert thresholds(dial) == pytest.approx([-2.25, -2.125]), "one of them is on its way"

    def test_another_scope_is_another_table(self, dial: Dial) -> None:
        dial.set_bits(5.0, "global")
        assert thresholds(dial) == [0.0, 0.0]

    def test_turning_keeps_the_tensor_that_compiled_code_holds(self, dial: Dial) -> None:
        dial.set_bits(3.0)
        before = [routed.router.threshold.data_ptr() for routed in dial.inputs]
        for bits in torch.linspace(2, 8, 50).tolist():
            dial.set_bits(bits)
        assert [routed.router.threshold.data_ptr() for routed in dial.inputs] == before

    @pytest.mark.parametrize("bits", [1, 1.9, 8.1, 9, float("nan")])
    def test_bits_out_of_range_are_refused_with_the_range_and_change_nothing(self, dial: Dial, bits: float) -> None:
        dial.set_bits(5.0)
        with pytest.raises(BitsError, match=r"bits asked for; this model holds 2 to 8"):
            dial.set_bits(bits)
        assert dial.budget == 5.0
        assert thresholds(dial) == pytest.approx([-2.0, -2.0])

    def test_a_row_out_of_range_is_refused(self, dial: Dial) -> None:
        with pytest.raises(BitsError, match=r"^9 bits asked"):
            dial.set_bits(torch.tensor([3.0, 9.0]))

    def test_the_context_turns_back_also_after_an_error(self, dial: Dial) -> None:
        dial.set_bits(5.0)
        with pytest.raises(ValueError, match="of the caller"), dial.bits([3.0, 4.0], "global"):
            raise ValueError("of the caller")
        assert dial.budget == 5.0
        assert thresholds(dial) == pytest.approx([-2.0, -2.0])

    def test_casting_the_model_leaves_scores_thresholds_and_scales_exact(self, linears: list[ElasticLinear]) -> None:
        before = {name: value.clone() for name, value in linears[0].state_dict().items()}
        linears[0].half()
        for name, value in linears[0].state_dict().items():
            assert value.dtype == before[name].dtype
            assert torch.equal(value, before[name])


class TestRows:
    def test_each_row_is_what_it_is_alone_at_its_budget(self, dial: Dial, linears: list[ElasticLinear]) -> None:
        x = torch.randn(3, 30, 40)
        budgets = [2.0, 4.3, 8.0]
        with torch.no_grad():
            dial.set_bits(torch.tensor(budgets))
            together = linears[0](x)
            for row, bits in enumerate(budgets):
                dial.set_bits(bits)
                torch.testing.assert_close(together[row], linears[0](x[row : row + 1])[0], atol=1e-5, rtol=0)

    def test_a_batch_of_another_size_is_refused_with_both_sizes(self, dial: Dial, linears: list[ElasticLinear]) -> None:
        dial.set_bits([2.0, 3.0])
        with pytest.raises(BitsError, match=r"2 budgets were set.*\(3, 5, 40\)"):
            linears[0](torch.randn(3, 5, 40))
        with pytest.raises(BitsError, match="2 budgets"):
            linears[0](torch.randn(4, 5, 40))  # a multiple, but not within a generation

    def test_a_generation_may_hold_each_row_several_times(self, dial: Dial, linears: list[ElasticLinear]) -> None:
        with dial.generation([2.0, 8.0], batch=2):
            read(linears, torch.randn(6, 4, 40))
        assert dial.bits_used().per_row == [2.0, 8.0]

    def test_budgets_that_are_not_as_many_as_rows_are_refused(self, dial: Dial) -> None:
        with pytest.raises(BitsError, match="2 budgets for a batch of 4 rows"), dial.generation([2.0, 8.0], batch=4):
            pass


class TestCounting:
    def test_used_bits_are_those_of_the_gates_weighted_by_parameters(
        self, dial: Dial, linears: list[ElasticLinear]
    ) -> None:
        linears[1].routed.n_weights = 3 * linears[0].routed.n_weights
        x = torch.randn(2, 50, 40)
        dial.set_bits(4.0)
        read(linears, x)
        own = [float(linear.routed.bits_of(linear.routed.gates(x)).mean()) for linear in linears]
        used = dial.bits_used(["a", "b"])
        assert own[0] != own[1]
        assert used.code_bits == pytest.approx((own[0] + 3 * own[1]) / 4)
        assert used.all_in_bits == pytest.approx(used.code_bits + 0.75)
        assert used.per_layer == {"a": pytest.approx(own[0]), "b": pytest.approx(own[1])}
        assert used.n_tokens == 100

    def test_counting_begins_anew_when_the_dial_turns(self, dial: Dial, linears: list[ElasticLinear]) -> None:
        dial.set_bits(8.0)
        read(linears, torch.randn(1, 10, 40))
        dial.set_bits(2.0)
        read(linears, torch.randn(1, 7, 40))
        assert (dial.bits_used().code_bits, dial.bits_used().n_tokens) == (2.0, 7)

    def test_a_generation_counts_over_turns_within_it(self, dial: Dial, linears: list[ElasticLinear]) -> None:
        dial.set_bits(8.0)
        with dial.generation(None, batch=1):
            read(linears, torch.randn(1, 10, 40))
            dial.set_bits(2.0)
            read(linears, torch.randn(1, 10, 40))
        assert (dial.bits_used().code_bits, dial.bits_used().n_tokens) == (5.0, 20)

    def test_a_context_within_a_generation_does_not_end_its_counting(
        self, dial: Dial, linears: list[ElasticLinear]
    ) -> None:
        dial.set_bits(8.0)
        with dial.generation(None, batch=1):
            read(linears, torch.randn(1, 10, 40))
            with dial.bits(2.0):
                read(linears, torch.randn(1, 10, 40))
            assert dial.budget == 8.0
        assert (dial.bits_used().code_bits, dial.bits_used().n_tokens) == (5.0, 20)

    def test_what_a_context_counted_can_be_asked_after_it(self, dial: Dial, linears: list[ElasticLinear]) -> None:
        dial.set_bits(8.0)
        with dial.bits(2.0):
            read(linears, torch.randn(1, 10, 40))
        assert dial.bits_used().code_bits == 2.0
        read(linears, torch.randn(1, 10, 40))
        assert dial.bits_used().code_bits == 8.0

    def test_padding_is_not_counted(self, dial: Dial, linears: list[ElasticLinear]) -> None:
        dial.set_bits(4.0)
        x = torch.randn(1, 6, 40)
        dial.state.mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
        read(linears, x)
        padded = dial.bits_used()
        dial.state.mask = None
        dial.set_bits(4.0)
        read(linears, x[:, 2:])
        assert padded == dial.bits_used()
        assert padded.n_tokens == 4

    def test_asking_before_anything_was_read_is_an_error(self, dial: Dial) -> None:
        with pytest.raises(BitsError, match="no tokens were read"):
            dial.bits_used()

    def test_turning_and_counting_work_across_inference_mode(self, dial: Dial, linears: list[ElasticLinear]) -> None:
        with torch.inference_mode():
            dial.set_bits([2.0, 3.0])
            read(linears, torch.randn(2, 4, 40))
        read(linears, torch.randn(2, 4, 40))
        dial.set_bits([3.0, 2.0])
        read(linears, torch.randn(2, 4, 40))
        assert dial.bits_used().n_tokens == 8


class TestHeldSlices:
    def test_a_model_with_fewer_planes_runs_up_to_them(self) -> None:
        linear = elastic_linear(0, max_bits=4)
        dial = Dial([linear.routed])
        x = torch.randn(1, 40, 40)
        whole = elastic_linear(0)
        Dial([whole.routed]).set_bits(8)
        for bits in (2.0, 4.0):
            dial.set_bits(bits)
            with torch.no_grad():
                expected = nn.functional.linear(x, whole.weight_at(int(bits)))
                assert torch.equal(linear(x), expected)
        with pytest.raises(BitsError, match="holds 2 to 4"):
            dial.set_bits(4.5)

    def test_its_thresholds_are_the_row_of_what_it_holds(self) -> None:
        linear = elastic_linear(0, max_bits=4)
        table = torch.full((5, 25), 9.0)
        table[2, :9] = torch.linspace(0, -8, 9)  # slices 2 + 1 + 1, budgets 2 to 4
        linear.routed.set_tables(table, table)
        dial = Dial([linear.routed])
        dial.set_bits(3.9)
        assert thresholds(dial) == pytest.approx([-7.6])

    def test_a_depth_that_is_no_prefix_is_refused(self) -> None:
        with pytest.raises(
            BitsError, match=r"max_bits \(5\) is no prefix of the slices; give one of \[2, 3, 4, 6, 8\]"
        ):
            held_slices(BITS, 5)


def test_a_routed_input_can_be_pickled_after_it_was_used(linears: list[ElasticLinear]) -> None:
    read(linears, torch.randn(1, 3, 40))
    copy: Any = pickle.loads(pickle.dumps(linears[0]))
    x = torch.randn(1, 3, 40)
    assert torch.equal(copy(x), linears[0](x))


def test_rising_thresholds_are_pooled_and_falling_ones_left_alone() -> None:
    table = torch.tensor([[3.0, 1.0, 2.0, 0.0, -torch.inf], [4.0, 3.0, 2.0, 1.0, 0.0]])
    expected = torch.tensor([[3.0, 1.5, 1.5, 0.0, -torch.inf], [4.0, 3.0, 2.0, 1.0, 0.0]])
    assert torch.equal(falling(table), expected)


def test_static_depths_of_collapsed_inputs_grow_with_the_budget_and_come_near_it() -> None:
    sizes = [5, 3, 8, 2, 5, 3, 8, 2]
    before = [0] * len(sizes)
    for step in range(25):
        bits = 2 + step / 4
        n_open = nested_allocation(sizes, BITS, bits)
        assert all(new >= old for new, old in zip(n_open, before, strict=True))
        depths = [2, 3, 4, 6, 8]
        mean = sum(depths[n] * size for n, size in zip(n_open, sizes, strict=True)) / sum(sizes)
        assert mean == pytest.approx(bits, abs=2 * max(sizes) / sum(sizes))
        before = n_open


@pytest.mark.parametrize(
    "bits", ["4", b"4", None, [], [[4.0]], "many", float("nan"), float("inf"), 10**400, True, object(), {}, ["4"], 1j]
)
def test_what_is_no_budget_is_refused_in_a_line(dial: Dial, bits: Any) -> None:
    before = dial.budget
    with pytest.raises(BitsError) as raised:
        dial.set_bits(bits)
    assert len(str(raised.value).splitlines()) == 1
    assert dial.budget == before
    with pytest.raises(BitsError), dial.bits(bits):
        pass


def test_a_table_that_is_not_there_is_refused(dial: Dial) -> None:
    with pytest.raises(BitsError, match="scope 'model'; layer or global is expected"):
        dial.set_bits(4, "model")  # type: ignore[arg-type]


class TestWord:
    """The dial keeps its word between the stored budgets too, also where scores have gaps."""

    SIZES = (12, 4, 22, 11, 12, 4, 22, 11, 12, 4, 22, 11, 12, 4, 22, 11)

    @pytest.fixture(params=[(2, 1, 1, 2, 2), (2, 1), (4, 4)], ids=str)
    def slices(self, request: pytest.FixtureRequest) -> tuple[int, ...]:
        return tuple(request.param)

    @pytest.mark.parametrize("gap", [0.0, 5.0])
    def test_what_is_used_is_what_is_asked(self, slices: tuple[int, ...], gap: float) -> None:
        generator = torch.Generator().manual_seed(0)
        layers = torch.arange(len(slices) - 1.0)
        scores = [
            prefix_scores(torch.randn(2000, len(slices) - 1, generator=generator) - gap * layers) for _ in self.SIZES
        ]
        dial = Dial([routed_input(size, slices) for size in self.SIZES])
        budgets = dial.inputs[0].budgets.tolist()
        for scope in ("layer", "global"):
            task = ThresholdTask(scores, self.SIZES, slices, budgets, scope)  # type: ignore[arg-type]
            dial._tables[scope] = MLPRouter.thresholds_for(task)  # type: ignore[index]
        asked = torch.arange(dial.lowest, dial.highest + 0.01, 0.02, dtype=torch.float64).clamp(max=dial.highest)
        shares = torch.tensor(self.SIZES) / sum(self.SIZES)
        for scope in ("layer", "global"):
            found = dial.thresholds(asked, scope)  # type: ignore[arg-type]
            assert (found[:, 1:] <= found[:, :-1]).all(), "turning the dial up closes nothing"
            for column, bits in enumerate(asked.tolist()):
                used = [average_bits(s, slices, t) for s, t in zip(scores, found[:, column], strict=True)]
                assert float((torch.stack(used) * shares).sum()) == pytest.approx(bits, abs=0.03), (scope, bits)


def routed_input(size: int, slices: tuple[int, ...]) -> RoutedInput:
    """An input that feeds so many weights."""
    return RoutedInput(MLPRouter(4, len(slices)), slices, size, None)


class TestContexts:
    """What is read within a context counts in it and in the contexts that it lies in."""

    def test_a_generation_within_a_context_counts_in_both(self, dial: Dial, linears: list[ElasticLinear]) -> None:
        with dial.bits(2.0):
            read(linears, torch.randn(1, 3, 40))
            with dial.generation(8.0, batch=1):
                read(linears, torch.randn(1, 5, 40))
            assert (dial.bits_used().code_bits, dial.bits_used().n_tokens) == (8.0, 5), "of the generation alone"
            read(linears, torch.randn(1, 2, 40))
            assert dial.bits_used().n_tokens == 10, "of all in the context so far"
        assert dial.bits_used().n_tokens == 10
        assert dial.bits_used().code_bits == pytest.approx((5 * 2 + 5 * 8) / 10)

    def test_generations_of_several_rows_count_in_a_context(self, dial: Dial, linears: list[ElasticLinear]) -> None:
        with dial.bits(4.0):
            for bits in ([2.0, 8.0], [8.0, 8.0]):
                with dial.generation(bits, batch=2):
                    read(linears, torch.randn(2, 5, 40))
                assert dial.bits_used().per_row == bits
        assert (dial.bits_used().code_bits, dial.bits_used().n_tokens) == (6.5, 20)

    def test_a_generation_within_a_generation_is_one(self, dial: Dial, linears: list[ElasticLinear]) -> None:
        with dial.generation(8.0, batch=1):
            read(linears, torch.randn(1, 3, 40))
            with dial.generation(None, batch=1):
                read(linears, torch.randn(1, 4, 40))
            read(linears, torch.randn(1, 5, 40))
        assert (dial.bits_used().code_bits, dial.bits_used().n_tokens) == (8.0, 12)

    def test_a_refused_budget_leaves_all_as_it_was(self, dial: Dial, linears: list[ElasticLinear]) -> None:
        dial.set_bits(8.0)
        with dial.bits(2.0):
            read(linears, torch.randn(1, 3, 40))
            with pytest.raises(BitsError), dial.generation(9.0, batch=1):
                pass
        assert (dial.budget, dial.bits_used().code_bits, dial.bits_used().n_tokens) == (8.0, 2.0, 3)

    def test_generations_of_several_threads_do_not_mix(self, dial: Dial, linears: list[ElasticLinear]) -> None:
        wrong: list[tuple[float, float]] = []
        barrier = threading.Barrier(4)

        def generate(bits: float) -> None:
            barrier.wait()
            for _ in range(5):
                with dial.generation(bits, batch=1):
                    for _ in range(3):
                        read(linears, torch.randn(1, 2, 40))
                        time.sleep(0)
                    used = dial.bits_used()
                if (used.code_bits, used.n_tokens) != (bits, 6):
                    wrong.append((bits, used.code_bits))

        threads = [threading.Thread(target=generate, args=(bits,)) for bits in (2.0, 8.0, 2.0, 8.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_the_tables_of_a_run_that_an_earlier_version_began_are_taken_on_as_they_are() -> None:
    old = RoutedInput(MLPRouter(4, len(BITS)), BITS, 32, budget_step=0.25)
    old.set_tables(torch.linspace(1, -5, 25).expand(5, -1), torch.linspace(2, -4, 25).expand(5, -1))
    new = RoutedInput(MLPRouter(4, len(BITS)), BITS, 32)
    assert (new.budget_step, len(new.run_columns), new.run_columns[:3]) == (0.0625, 17, [0, 4, 8])
    new.load_state_dict(old.state_dict())
    assert (new.budget_step, new.run_columns) == (0.25, [*range(8), *range(8, 25, 2)])
    dials = [Dial([routed]) for routed in (old, new)]
    for dial in dials:
        dial.set_bits(3.4)
    assert thresholds(dials[0]) == thresholds(dials[1]) == pytest.approx([-0.4])
