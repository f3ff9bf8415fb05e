"""What a stage does to what it trains: mixed depths, gradients, weights that are kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mobiq_lightning.calibration import require_gradients
from mobiq_lightning.calibration.model_batch import ModelBatch
from mobiq_lightning.calibration.schedule import Stage
from mobiq_lightning.calibration.stage_training import mixture
from mobiq_lightning.nn import (
    BlockLayout,
    CalibratedBlock,
    FixedSlices,
    RoutedInput,
    SlicedLinear,
    fixed_depth,
    keeping_weights,
    meet_budget,
    read_as,
)
from mobiq_lightning.sources import load_source
from mobiq_lightning.strategies import MLPRouter, ResidualSlices, StaticRouter

DEPTHS = (2, 3, 4, 6, 8)
MIXED = Stage(train=["codes"], depth=4, epochs=1, scope="model", mixed=0.5)


class TestMixture:
    def test_some_steps_mix_the_depth_with_the_one_before_it(self) -> None:
        drawn = [mixture(MIXED, DEPTHS, 16, step) for step in range(400)]
        mixed = [found for found in drawn if found is not None]
        assert 0.4 < len(mixed) / len(drawn) < 0.6
        assert {count for found in mixed for count in found} == {2, 3}
        parts = [found.count(3) / 16 for found in mixed]
        assert min(parts) == 1 / 16, "one input at least reads what is trained"
        assert max(parts) == 1
        assert 0.4 < sum(parts) / len(parts) < 0.65

    def test_it_is_a_function_of_the_step(self) -> None:
        assert [mixture(MIXED, DEPTHS, 8, step) for step in range(20)] == [
            mixture(MIXED, DEPTHS, 8, step) for step in range(20)
        ]

    def test_a_stage_that_does_not_mix_never_does(self) -> None:
        plain = Stage(train=["codes"], depth=4, epochs=1, scope="model")
        routers = Stage(train=["routers"], epochs=1, scope="model")
        assert not any(mixture(stage, DEPTHS, 4, step) for stage in (plain, routers) for step in range(50))


class Sliced:
    """A small model whose linears are sliced."""

    def __init__(self, folder: Path, router: Any = MLPRouter) -> None:
        self.model: Any = load_source(str(folder)).model
        layout = BlockLayout()

        def scheme(out_features: int, in_features: int) -> ResidualSlices:
            return ResidualSlices(out_features, in_features, DEPTHS_BITS, group_size=16)

        self.blocks = [
            CalibratedBlock(block, layout.group_linears(block, "input"), scheme, router)
            for block in layout.find(self.model)
        ]

    @property
    def inputs(self) -> list[RoutedInput]:
        return [routed for block in self.blocks for routed in block.routed_inputs()]

    @property
    def linears(self) -> list[SlicedLinear]:
        return [linear for block in self.blocks for linear in block.sliced_linears()]


DEPTHS_BITS = (2, 1, 1, 2, 2)
IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sliced(make_model: Callable[..., Path]) -> Sliced:
    return Sliced(make_model())


def test_a_mixture_stands_for_its_depth_alone(sliced: Sliced) -> None:
    counts = [2 + position % 2 for position in range(len(sliced.inputs))]
    run = ModelBatch(sliced.model, list(BlockLayout().find(sliced.model)), sliced.inputs, IDS)
    plain = run.at_depth(4)
    run.mix(4, counts)
    with read_as(sliced.inputs, [FixedSlices(count) for count in counts]):
        expected = sliced.model(input_ids=IDS).logits
    assert torch.equal(run.at_depth(4), expected)
    assert not torch.equal(expected, plain)
    with fixed_depth(sliced.inputs, 8):
        assert torch.equal(run.at_depth(8), sliced.model(input_ids=IDS).logits)


class TestGradients:
    def required(self, sliced: Sliced, stage: Stage, given_up: bool = False) -> dict[str, bool]:
        blocks = sliced.blocks[:1]
        record = SimpleNamespace(given_up=[0] if given_up else [])
        source = SimpleNamespace(block_at=lambda index: sliced.blocks[index])
        module: Any = SimpleNamespace(blocks_in_training=lambda: blocks, stage=stage, record=record, sliced=source)
        require_gradients(module)
        kinds: tuple[Any, ...] = ("ranges", "routers")
        return {kind: all(p.requires_grad for p in blocks[0].parameters_of(kind)) for kind in kinds}

    def test_only_what_is_trained_has_gradients(self, sliced: Sliced) -> None:
        assert self.required(sliced, Stage(train=["routers"], epochs=1)) == {"ranges": False, "routers": True}
        assert self.required(sliced, Stage(train=["ranges"], epochs=1)) == {"ranges": True, "routers": False}

    def test_a_block_that_fell_back_leaves_the_loss_its_gradient(self, sliced: Sliced) -> None:
        codes = Stage(train=["codes"], depth=3, epochs=1)
        assert self.required(sliced, codes, given_up=True) == {"ranges": True, "routers": True}

    def test_routers_with_nothing_to_learn_leave_the_loss_its_gradient(self, make_model: Callable[..., Path]) -> None:
        sliced = Sliced(make_model(), StaticRouter)
        assert self.required(sliced, Stage(train=["routers"], epochs=1))["ranges"]


class TestKeptWeights:
    def test_what_is_computed_is_the_same_and_weights_are_made_once(
        self, sliced: Sliced, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def outputs() -> list[torch.Tensor]:
            found = []
            with fixed_depth(sliced.inputs, 4):
                found.append(sliced.model(input_ids=IDS).logits)
            with meet_budget(sliced.inputs, 3.5):
                found.append(sliced.model(input_ids=IDS).logits)
                with torch.no_grad():
                    found.append(sliced.model(input_ids=IDS).logits)
            return found

        expected = outputs()
        assert expected[1].requires_grad
        with keeping_weights(sliced.linears, 2**30):
            assert all(map(torch.equal, outputs(), expected))
            monkeypatch.setattr(ResidualSlices, "prefixes", None)
            monkeypatch.setattr(ResidualSlices, "weight_at", None)
            assert all(map(torch.equal, outputs(), expected))
        with fixed_depth(sliced.inputs, 4), pytest.raises(TypeError):
            sliced.model(input_ids=IDS)

    def test_beyond_the_limit_they_are_made_for_every_product(self, sliced: Sliced) -> None:
        with fixed_depth(sliced.inputs, 4):
            expected = sliced.model(input_ids=IDS).logits
            with keeping_weights(sliced.linears, 0):
                assert torch.equal(sliced.model(input_ids=IDS).logits, expected)
                assert all(linear.kept is not None and linear.kept.n_bytes == 0 for linear in sliced.linears)
        assert all(linear.kept is None for linear in sliced.linears)

    def test_gradients_reach_the_routers(self, sliced: Sliced) -> None:
        for block in sliced.blocks:
            for router in block.routers():
                router.train()
        grads = []
        for limit in (None, 2**30):
            sliced.model.zero_grad()
            nn.Module.zero_grad(sliced.blocks[0])
            context: Any = keeping_weights(sliced.linears, limit) if limit else nullcontext()
            with context, meet_budget(sliced.inputs, 3.5):
                sliced.model(input_ids=IDS).logits.square().mean().backward()
                if limit:  # what is kept belongs to no step
                    sliced.model.zero_grad()
                    nn.Module.zero_grad(sliced.blocks[0])
                    sliced.model(input_ids=IDS).logits.square().mean().backward()
            grads.append([p.grad.clone() for p in sliced.blocks[0].parameters_of("routers") if p.grad is not None])
        assert grads[0]
        for plain, kept in zip(*grads, strict=True):
            torch.testing.assert_close(kept, plain)
