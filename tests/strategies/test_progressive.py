"""Slices that are trained one after the other: what is frozen stays, what is trained starts where it should."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mobiq_lightning import load
from mobiq_lightning.cli import main
from mobiq_lightning.nn import ElasticLinear
from mobiq_lightning.strategies import ProgressiveSlices, ResidualSlices
from mobiq_lightning.strategies.slices.ranges import learned_range
from mobiq_lightning.strategies.slices.trained_code import refine
from tests.checkpoints import tensors_of
from tests.conftest import UNTIMED, small_recipe

BITS = (2, 1, 1, 2, 2)


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(12, 172)


@pytest.fixture
def scheme() -> ProgressiveSlices:
    return ProgressiveSlices(12, 172, slice_bits=BITS, group_size=64)


def moved(scheme: ProgressiveSlices, by: float) -> None:
    """As training would: each target somewhere else."""
    torch.manual_seed(1)
    with torch.no_grad():
        scheme.target += by * torch.randn_like(scheme.target)


class TestCode:
    def test_without_training_it_is_the_code_of_residual_slices(
        self, scheme: ProgressiveSlices, weight: torch.Tensor
    ) -> None:
        plain = ResidualSlices(12, 172, slice_bits=BITS, group_size=64)
        assert torch.equal(scheme.prefixes(weight), plain.prefixes(weight))
        for depth in (2, 4):  # slices that begin and end where they were
            scheme.start_slice(weight, depth)
            assert torch.equal(scheme.prefixes(weight), plain.prefixes(weight))
        scheme.freeze(weight)
        assert torch.equal(scheme.prefixes(weight), plain.prefixes(weight))

    def test_training_a_slice_leaves_all_coarser_depths_as_they_are(
        self, scheme: ProgressiveSlices, weight: torch.Tensor
    ) -> None:
        frozen: dict[int, torch.Tensor] = {}
        for k, depth in enumerate(scheme.depths):
            assert scheme.start_slice(weight, depth)
            before = scheme.weight_at(weight, k + 1)
            moved(scheme, 0.3)
            frozen[k] = scheme.weight_at(weight, k + 1)
            assert not torch.equal(before, frozen[k])
            assert all(torch.equal(scheme.weight_at(weight, e + 1), read) for e, read in frozen.items())
        scheme.freeze(weight)
        assert torch.equal(scheme.prefixes(weight), torch.stack(list(frozen.values())))
        packed = scheme.pack(weight)
        for k, depth in enumerate(scheme.depths):
            assert torch.equal(packed.weight_at(depth), frozen[k])

    def test_a_slice_starts_as_near_to_the_weight_as_the_frozen_code_lets_it(
        self, scheme: ProgressiveSlices, weight: torch.Tensor
    ) -> None:
        scheme.start_slice(weight, 2)
        moved(scheme, 0.5)
        coarse = scheme.weight_at(weight, 1)
        scheme.start_slice(weight, 4)
        for k, depth in enumerate(scheme.depths):
            read = scheme.weight_at(weight, k + 1)
            half_cell = scheme.pack(weight).scale.float().repeat_interleave(64, 1)[:, :172] * 2.0**-depth / 2
            # Weights that the trained code left inside of their cell are read to half a step, as by any nested code.
            kept = (coarse - weight).abs() < 0.999 * half_cell * 2.0 ** (depth - 2)
            assert 0.1 < float(kept.float().mean()) < 0.95
            assert bool(((read - weight).abs() <= half_cell + 1e-4)[kept].all())

    def test_depths_beyond_the_one_in_training_follow_it(self, scheme: ProgressiveSlices, weight: torch.Tensor) -> None:
        scheme.start_slice(weight, 2)
        moved(scheme, 0.5)
        two = scheme.weight_at(weight, 1)
        packed = scheme.pack(weight)
        assert torch.equal(packed.weight_at(2), two)
        assert torch.equal(packed.weight_at(8), scheme.weight_at(weight, 5))

    def test_a_slice_that_is_in_training_or_done_does_not_begin_again(
        self, scheme: ProgressiveSlices, weight: torch.Tensor
    ) -> None:
        assert scheme.start_slice(weight, 2)
        moved(scheme, 0.3)
        kept = scheme.target.detach().clone()
        assert not scheme.start_slice(weight, 2)
        assert torch.equal(scheme.target, kept)
        assert scheme.start_slice(weight, 3)
        assert not scheme.start_slice(weight, 2)

    def test_rounding_moves_a_code_to_a_neighbour_at_most(
        self, scheme: ProgressiveSlices, weight: torch.Tensor
    ) -> None:
        scheme.start_slice(weight, 4)
        before = scheme.weight_at(weight, 3)
        moved(scheme, 2.0)
        far = (scheme.weight_at(weight, 3) - before).abs().max().item()
        scheme.bound_rounding(weight)
        step = scheme.pack(weight).scale.float().repeat_interleave(64, 1)[:, :172] / 16
        change = (scheme.weight_at(weight, 3) - before).detach().abs() / step
        assert far > 3 * float(step.max())
        assert float(change.max()) <= 1 + 1e-3
        assert float((change > 0.5).float().mean()) > 0.1

    def test_no_slice_leaves_a_weight_further_outside_of_its_cell_than_its_bound(self, weight: torch.Tensor) -> None:
        scheme = ProgressiveSlices(12, 172, slice_bits=BITS, group_size=64, max_saturation=4)
        free = ProgressiveSlices(12, 172, slice_bits=BITS, group_size=64)
        for depth in scheme.depths:
            for each in (scheme, free):
                each.start_slice(weight, depth)
                moved(each, 0.3)
                each.bound_saturation(weight)
        step = scheme.pack(weight).scale.float().repeat_interleave(64, 1)[:, :172] / 256

        def miss(each: ProgressiveSlices) -> torch.Tensor:
            return ((each.weight_at(weight, 5) - weight).abs() / step).detach()

        assert float(miss(scheme).max()) <= 4 + 0.5 + 0.1  # beside rounding, and what a target keeps from a border
        assert float((miss(scheme) > 2).float().mean()) > 0.01  # codes did move
        assert float(miss(free).max()) > 32

    def test_a_bound_of_no_saturation_keeps_the_codes_of_the_weight(self, weight: torch.Tensor) -> None:
        scheme = ProgressiveSlices(12, 172, slice_bits=BITS, group_size=64, max_saturation=0)
        before = scheme.prefixes(weight)
        for depth in scheme.depths:
            scheme.start_slice(weight, depth)
            moved(scheme, 0.3)
            scheme.bound_saturation(weight)
        assert torch.equal(scheme.prefixes(weight), before)

    @pytest.mark.parametrize("bound", [-1, float("nan"), True, "4", 257])
    def test_a_bound_that_is_none_is_refused(self, bound: Any) -> None:
        with pytest.raises(ValueError, match="max_saturation"):
            ProgressiveSlices(12, 172, slice_bits=BITS, max_saturation=bound)

    def test_known_bits_are_kept_whatever_the_position_is(self) -> None:
        unit = torch.tensor([[0.1, 0.9, -3.0, 5.0]])
        known = torch.tensor([[2.0, 2.0, 0.0, 3.0]])
        assert refine(unit, known, 2, 4).tolist() == [[8.0, 11.0, 0.0, 15.0]]
        assert refine(unit, None, 0, 2).tolist() == [[0.0, 3.0, 0.0, 3.0]]


class TestGradients:
    def test_the_target_has_that_of_the_weight_that_is_read(
        self, scheme: ProgressiveSlices, weight: torch.Tensor
    ) -> None:
        for depth, k in ((2, 1), (4, 3)):
            scheme.start_slice(weight, depth)
            gradient = torch.randn(12, 172)
            scheme.zero_grad()
            (scheme.weight_at(weight, k) * gradient).sum().backward()
            assert scheme.target.grad is not None
            inside = scheme.target.grad != 0
            assert float(inside.float().mean()) > 0.95  # what lies outside of the whole range has none
            assert torch.equal(scheme.target.grad[inside], gradient[inside])

    def test_finer_depths_speak_only_for_codes_that_leave_the_weight_outside_of_their_cell(
        self, scheme: ProgressiveSlices, weight: torch.Tensor
    ) -> None:
        scheme.start_slice(weight, 2)
        home = scheme.weight_at(weight, 1)
        moved(scheme, 0.4)
        away = scheme.weight_at(weight, 1) != home
        scheme.weight_at(weight, 5).sum().backward()
        assert scheme.target.grad is not None
        touched = scheme.target.grad != 0
        assert 0.05 < float(away.float().mean()) < 0.95
        assert bool((touched <= away).all())
        assert float(touched.float().sum()) > 0.8 * float(away.float().sum())  # the rest lies outside of the range

    def test_ranges_have_that_of_the_same_code_written_out(
        self, scheme: ProgressiveSlices, weight: torch.Tensor
    ) -> None:
        scheme.start_slice(weight, 2)
        moved(scheme, 0.3)
        gradient = torch.randn(12, 172)
        (scheme.weight_at(weight, 1) * gradient).sum().backward()
        found = scheme.low_clip.grad
        scheme.low_clip.grad = None
        learned = learned_range(weight, scheme.low_clip, scheme.high_clip, 64)
        scale, bias = (v.repeat_interleave(64, 1)[:, :172] for v in learned)
        unit = (scheme.target.detach() - bias) / scale + 0.5
        code = (unit * 4).floor().clamp(0, 3)
        clipped = unit.clamp(0, 1)
        position = clipped + ((code + 0.5) / 4 - clipped).detach()  # straight through
        ((bias + scale * (position - 0.5)) * gradient).sum().backward()
        assert found is not None
        assert scheme.low_clip.grad is not None
        assert float(found.abs().max()) > 0.1
        torch.testing.assert_close(found, scheme.low_clip.grad, rtol=1e-4, atol=1e-5)


def test_the_state_is_restored_at_every_point_of_the_training(scheme: ProgressiveSlices, weight: torch.Tensor) -> None:
    for depth in (2, 3, None):
        if depth is None:
            scheme.freeze(weight)
        else:
            scheme.start_slice(weight, depth)
            moved(scheme, 0.3)
        other = ProgressiveSlices(12, 172, slice_bits=BITS, group_size=64)
        other.load_state_dict(copy.deepcopy(scheme.state_dict()))
        assert torch.equal(other.prefixes(weight), scheme.prefixes(weight))
        assert other.target.shape == scheme.target.shape


PROGRESSIVE = [
    "--model.slices=ProgressiveSlices",
    "--model.slices.init_args.slice_bits=[2, 1, 1, 2, 2]",
    "--model.slices.init_args.group_size=16",
    "--model.rates.codes=1e-2",
    "--model.threshold_scope=global",
    # Trained for eight steps at 2 bits, blocks of random weights are worse than rounding at 4.
    f"--trainer.callbacks=[{{class_path: mobiq_lightning.callbacks.Guards, init_args: {{worse_block: record}}}}, {UNTIMED}]",
    "--model.stages=[{epochs: 2, train: [codes, ranges], depth: 2}, "
    "{epochs: 1, train: [codes, ranges], depth: 2, scope: model}, "
    "{epochs: 1, train: [codes], bounds: [rounding], depth: 4, lr_scale: 0.2}, "
    "{epochs: 1, train: [codes], depth: 8, lr_scale: 0.1}, {epochs: 2, train: [routers], scope: model}]",
]


@pytest.fixture(scope="module")
def progressive_run(make_model: Any, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("progressive")
    assert main(["fit", *small_recipe(make_model(), text_file, folder), *PROGRESSIVE]) == 0
    return folder / "run"


class TestFit:
    def test_the_base_that_was_trained_is_nearer_to_full_precision_than_rounding(self, progressive_run: Path) -> None:
        rows = json.loads((progressive_run / "results.json").read_text())["rows"]
        kl = {(r["allocation"], r["target_bits"]): r["kl"] for r in rows}
        assert kl["router", 2.0] < kl["rtn", 2.0]

    def test_what_is_logged_names_block_and_model_stages(self, progressive_run: Path) -> None:
        lines = [json.loads(line) for line in (progressive_run / "metrics.jsonl").read_text().splitlines()]
        named = {name.removesuffix("_epoch").removesuffix("_step") for line in lines for name in line}
        assert {"block/error_2_bits", "block/error_8_bits", "model/kl_2_bits", "model/kl_routed"} <= named
        assert "model/kl_8_bits" not in named

    def test_a_model_stage_meets_its_budget_exactly_in_every_step(self, progressive_run: Path) -> None:
        lines = [json.loads(line) for line in (progressive_run / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "model/routed_bits_step" in line]
        assert steps
        for line in steps:  # to within one slice of the largest input of one token
            assert line["model/routed_bits_step"] == pytest.approx(line["model/target_bits_step"], abs=0.01)


@torch.no_grad()
def farthest(folder: Path, source: Path) -> float:
    """How far weights of a checkpoint at full depth are from those of their source at most, in steps of the 8-bit code."""
    weights = load_file(source / "model.safetensors")
    linears = [(n, m) for n, m in load(folder, dtype=torch.float32).named_modules() if isinstance(m, ElasticLinear)]
    return max(
        float(((m.weight_at(8) - weights[f"{n}.weight"].float()).abs() * 256 / scales(m)).max()) for n, m in linears
    )


def scales(linear: ElasticLinear) -> torch.Tensor:
    """The width (O, I) of the range of each weight."""
    return linear.packed.scale.float().repeat_interleave(linear.group_size, 1)[:, : linear.in_features]


def test_a_bound_on_saturation_holds_through_all_stages(make_model: Any, text_file: Path, tmp_path: Path) -> None:
    model = make_model()
    bounded = [*PROGRESSIVE, "--model.slices.init_args.max_saturation=2", "--model.transform=NoTransform"]
    stages = "{epochs: 2, train: [codes], depth: 2}, {epochs: 1, train: [codes], depth: 4, scope: model}"
    for folder, arguments in (
        ("bounded", bounded),
        ("free", [*bounded, "--model.slices.init_args.max_saturation=null"]),
    ):
        given = [*small_recipe(model, text_file, tmp_path / folder), *arguments, f"--model.stages=[{stages}]"]
        assert main(["fit", *given]) == 0
    assert (
        farthest(tmp_path / "bounded" / "run" / "elastic", model)
        <= 2 + 0.5 + 0.1
        < farthest(tmp_path / "free" / "run" / "elastic", model)
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_computing_blocks_again_changes_nothing(
    recipe_arguments: list[str], tmp_path: Path, progressive_run: Path, recompute: bool
) -> None:
    arguments = [*recipe_arguments, *PROGRESSIVE, f"--model.recompute_blocks={str(recompute).lower()}"]
    assert main(["fit", *arguments]) == 0
    one, other = tensors_of(progressive_run / "elastic"), tensors_of(tmp_path / "run" / "elastic")
    planes = [name for name in one if "plane" in name]
    assert planes
    assert all(torch.equal(one[name], other[name]) for name in planes)
    routers = [name for name in one if ".router." in name]
    assert routers
    for name in routers:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
