"""What slices gain the whole model: measured as a direct computation would, kept with the run, used by the comparison."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import mobiq_lightning
from mobiq_lightning.calibration import KeptGains, gradient_gains, measured_gains
from mobiq_lightning.calibration.block_caller import BlockCaller
from mobiq_lightning.calibration.planning import beside
from mobiq_lightning.callbacks import layer_gains as callback
from mobiq_lightning.cli import main
from mobiq_lightning.errors import MobiqError, RecipeError
from mobiq_lightning.evaluation import layer_gains as evaluated
from mobiq_lightning.evaluation import read_gains, token_gains
from mobiq_lightning.nn import BlockLayout, CalibratedBlock, SlicedLinear, routed_inputs
from mobiq_lightning.sources import load_source
from mobiq_lightning.strategies import ResidualSlices, StaticRouter
from tests.conftest import UNTIMED, Run

BITS = (2, 1, 1)
IDS = torch.randint(3, 290, (3, 24), generator=torch.Generator().manual_seed(0))


@dataclass
class Sliced:
    """A small model with sliced linears, the same model as it was, and for each input the names of its linears."""

    model: Any
    plain: Any
    blocks: list[CalibratedBlock]
    names: list[list[str]]

    @property
    def inputs(self) -> list[Any]:
        return [routed for block in self.blocks for routed in block.routed_inputs()]

    def weight(self, name: str, n_slices: int) -> torch.Tensor:
        linear: SlicedLinear = self.model.get_submodule(name)
        return linear.scheme.weight_at(linear.weight, n_slices).detach()

    def gradient_gains(
        self, kept: KeptGains | None = None, stop_after: int = 100, steps: list[int] | None = None
    ) -> torch.Tensor:
        def step(done: int) -> None:
            if steps is not None:
                steps.append(done)
            if done >= stop_after:
                raise KeyboardInterrupt

        caller = BlockCaller(self.model, list(BlockLayout().find(self.model)), torch.device("cpu"))
        return gradient_gains(caller, [block.readers for block in self.blocks], IDS, kept, step)

    def divergence_at(self, depths: list[int]) -> float:
        """KL to full precision with plain linears whose weights are those of so many slices for each input."""
        other = copy.deepcopy(self.plain)
        with torch.no_grad():
            for n_slices, names in zip(depths, self.names, strict=True):
                for name in names:
                    other.get_submodule(name).weight.copy_(self.weight(name, n_slices))
            full, read = (F.log_softmax(m(input_ids=IDS).logits.double(), -1) for m in (self.plain, other))
        return float((full.exp() * (full - read)).sum(-1).mean())


@pytest.fixture
def sliced(make_model: Callable[..., Path]) -> Sliced:
    source = load_source(str(make_model()))
    plain, layout, blocks, names = copy.deepcopy(source.model), BlockLayout(), [], []
    for number, block in enumerate(layout.find(source.model)):
        groups = layout.group_linears(block, "input")
        names += [[f"model.layers.{number}.{name}" for name in group] for group in groups]
        scheme = lambda o, i: ResidualSlices(o, i, slice_bits=BITS, group_size=16)
        blocks.append(CalibratedBlock(block, groups, scheme, StaticRouter))
    return Sliced(source.model, plain, blocks, names)


def test_a_slice_is_probed_where_all_other_inputs_read_it_too(sliced: Sliced) -> None:
    gains = token_gains(sliced.model, sliced.inputs, IDS, batch_size=2).mean(-1)
    whole = [sliced.divergence_at([k] * 8) for k in (1, 2, 3)]
    for row in range(8):
        without = [sliced.divergence_at([k - (i == row) for i in range(8)]) for k in (2, 3)]
        assert gains[row].tolist() == pytest.approx([without[0] - whole[1], without[1] - whole[2]], abs=2e-5)


def test_probes_at_one_depth_are_differences_of_the_models_divergence(sliced: Sliced) -> None:
    gains = token_gains(sliced.model, sliced.inputs, IDS, reference_bits=3, batch_size=2)
    assert gains.shape == (8, 2, IDS.numel())
    gains = gains.mean(-1)
    for row in range(8):
        found = [sliced.divergence_at([k if i == row else 2 for i in range(8)]) for k in (1, 2, 3)]
        assert gains[row].tolist() == pytest.approx([found[0] - found[1], found[1] - found[2]], abs=2e-5)


def test_gradient_gains_are_half_the_fisher_weighted_squared_errors(sliced: Sliced) -> None:
    gains = sliced.gradient_gains()
    plain = sliced.plain.requires_grad_(True)
    weights = {name: plain.get_submodule(name).weight for names in sliced.names for name in names}
    squares: dict[str, torch.Tensor] = {}
    for ids in IDS.split(1):
        plain.zero_grad()
        F.cross_entropy(plain(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum").backward()
        for name, weight in weights.items():
            squares[name] = squares.get(name, 0) + weight.grad.double() ** 2
    for row, names in enumerate(sliced.names):
        changes = [[(squares[n], (weights[n].detach() - sliced.weight(n, k)) ** 2) for n in names] for k in (1, 2, 3)]
        errors = [sum(float((f * e).sum()) for f, e in of_depth) / (2 * 3 * 23) for of_depth in changes]
        assert gains[row].tolist() == pytest.approx([errors[0] - errors[1], errors[1] - errors[2]], rel=1e-4)
    assert not any(parameter.requires_grad for parameter in sliced.model.parameters())


def test_gains_that_were_kept_are_not_measured_again_and_the_rest_is_the_same_bit_by_bit(
    sliced: Sliced, tmp_path: Path
) -> None:
    whole = sliced.gradient_gains()
    path = tmp_path / "kept.safetensors"
    with pytest.raises(KeyboardInterrupt):
        sliced.gradient_gains(KeptGains(path, {"windows": 3}), stop_after=2 + 3)  # both ways there, and one back
    kept = KeptGains(path, {"windows": 3})
    assert set(kept.tensors) == {"gains.1", "in_front_of.1"}
    steps: list[int] = []
    assert torch.equal(sliced.gradient_gains(kept, steps=steps), whole)
    assert steps == [8]
    assert KeptGains(path, {"windows": 4}).tensors == {}
    path.write_bytes(path.read_bytes()[:-9])
    assert KeptGains(path, {"windows": 3}).tensors == {}


def test_an_input_whose_slices_do_nothing_gains_nothing(sliced: Sliced) -> None:
    with torch.no_grad():  # what o_proj of the first block reads is multiplied by zeros
        sliced.model.model.layers[0].self_attn.o_proj.weight.zero_()
    row = sliced.names.index(["model.layers.0.self_attn.o_proj"])
    for gains in (
        token_gains(sliced.model, sliced.inputs, IDS, 3).mean(-1),
        sliced.gradient_gains(),
    ):
        assert gains[row].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
        assert float(gains.sum()) > 0.01


class TestOfARun:
    def test_the_file_has_a_row_for_each_input_and_slice_and_results_a_summary(self, finished: Run) -> None:
        run, _ = finished
        kept = json.loads((run / "layer_gains.json").read_text())
        assert (kept["windows"], kept["seq_len"], kept.get("reference_bits")) == (8, 32, None)
        of_tokens = {"token_std", "first_token", "norm_rank", "router_rank"}
        assert set(kept["rows"][0]) == {"input", "weights", "slice", "bits", "probes"} | of_tokens
        assert len(kept["rows"]) == 8 * 4
        assert [row["bits"] for row in kept["rows"][:4]] == [1, 1, 2, 2]
        summary = json.loads((run / "results.json").read_text())["layer_gains"]
        assert summary["methods"]["probes"]["total"] == pytest.approx(sum(row["probes"] for row in kept["rows"]))

    def test_shuffled_tokens_use_the_bits_of_the_router_and_best_layers_come_near(self, finished: Run) -> None:
        rows = json.loads((finished[0] / "results.json").read_text())["rows"]
        used = {row["allocation"]: row["used_bits"] for row in rows if row["target_bits"] == 2.5}
        assert used["shuffled"] == pytest.approx(used["router"], abs=0.03)
        assert used["layers"] == pytest.approx(used["router"], abs=0.06)

    def test_a_run_without_the_file_is_compared_without_best_layers(self, finished: Run, tmp_path: Path) -> None:
        run, arguments = finished
        shutil.copytree(run, tmp_path / "run")
        (tmp_path / "run" / "layer_gains.json").unlink()
        changed = [
            f"--trainer.default_root_dir={tmp_path / 'run'}",
            "--model.random_seeds=[]",
            "--model.eval_bits=[3.5]",
        ]
        assert main(["validate", *arguments, *changed]) == 0
        rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
        assert {row["allocation"] for row in rows if row["target_bits"] == 3.5} == {"router", "static"}
        assert (tmp_path / "run" / "results.png").is_file()

    def test_gains_of_other_inputs_are_not_taken(self, finished: Run) -> None:
        path, model = finished[0] / "layer_gains.json", mobiq_lightning.load(finished[0])
        names = [name for name, _ in model.named_modules() if name.endswith(".input")]
        names = [name.removesuffix(".input") for name in names]
        gains = read_gains(path, names, (2, 1, 1, 2, 2))
        assert gains is not None
        assert gains.shape == (8, 4)
        assert read_gains(path, names, (2, 2, 2, 2)) is None
        assert read_gains(path, names[::-1], (2, 1, 1, 2, 2)) is None
        assert read_gains(path.with_name("none.json"), names, (2, 1, 1, 2, 2)) is None


@contextmanager
def too_small(module: Any, needed: int) -> Iterator[str | None]:
    yield "the whole model would take about 26.0 GB on cuda:0, of which 20.0 GB are free"


FAST = [
    "--model.epochs_per_block=1",
    "--model.eval_bits=[2.5]",
    "--model.stages=[{share: 1.0, train: [ranges, transforms]}]",
]


@pytest.mark.parametrize("kind", ["GradientLayerRouter", "ProbedLayerRouter"])
def test_routers_of_layers_are_fitted_saved_and_loaded(kind: str, recipe_arguments: list[str], tmp_path: Path) -> None:
    assert main(["fit", *recipe_arguments, f"--model.router={kind}", *FAST]) == 0
    kept = json.loads((tmp_path / "run" / "layer_gains.json").read_text())["rows"]
    model = mobiq_lightning.load(tmp_path / "run")
    rates = torch.cat([routed.router.rates for routed in routed_inputs(model)])
    assert len(rates.unique()) > 8
    assert all(("gradients" in row) is (kind == "GradientLayerRouter") for row in kept)
    model.set_bits(3.0)
    model(input_ids=IDS)
    used = model.bits_used(per_layer=True)
    assert used.code_bits == pytest.approx(3.0, abs=0.2)
    assert {round(bits, 6) for bits in used.per_layer.values()} <= {2, 3, 4, 6, 8}
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    perplexity = {row["allocation"]: row["perplexity"] for row in rows if row["target_bits"] == 2.5}
    assert perplexity["shuffled"] == pytest.approx(perplexity["router"])  # no tokens are told apart


def test_layers_are_learned_in_a_stage_of_the_whole_model(recipe_arguments: list[str], tmp_path: Path) -> None:
    block = "{share: null, epochs: 1, train: [ranges, transforms]}"
    stages = f"--model.stages=[{block}, {{share: null, scope: model, epochs: 3, train: [routers], lr_scale: 10.0}}]"
    assert main(["fit", *recipe_arguments, "--model.router=LearnedLayerRouter", *FAST[:2], stages]) == 0
    scores = torch.stack([r.router.layer_scores() for r in routed_inputs(mobiq_lightning.load(tmp_path / "run"))])
    assert bool((scores.std(0) > 1e-3).all())
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert next(r["used_bits"] for r in rows if r["allocation"] == "router") == pytest.approx(2.5, abs=0.2)


PROBES = "{class_path: mobiq_lightning.callbacks.LayerGains, init_args: {methods: [probes]}}"


def test_a_model_that_does_not_fit_is_said_and_compared_without_best_layers(
    recipe_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measured_gains, "whole_model_on_device", too_small)
    assert main(["fit", *recipe_arguments, *FAST, f"--trainer.callbacks=[{UNTIMED}, {PROBES}]"]) == 0
    said = "not measured: the whole model would take about 26.0 GB on cuda:0, of which 20.0 GB are free"
    assert said in "".join(capsys.readouterr())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["layer_gains"] == said
    assert "layers" not in {row["allocation"] for row in results["rows"]}
    assert not (tmp_path / "run" / "layer_gains.json").exists()


def test_where_probes_cost_more_than_a_tenth_of_the_calibration_gradients_choose_and_it_is_said(
    recipe_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(beside, "LITTLE", 0.0)
    assert main(["fit", *recipe_arguments, *FAST]) == 0
    kept = json.loads((tmp_path / "run" / "layer_gains.json").read_text())
    assert set(kept["rows"][0]) == {"input", "weights", "slice", "bits", "gradients"}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "layers" in {row["allocation"] for row in results["rows"]}
    why = results["layer_gains"]["why"]
    assert why.startswith("probes would take ")
    assert results["layer_gains"]["windows"] < 8
    said = f"Best layers are chosen by squared gradients on {kept['windows']} windows: {why}."
    assert said in "".join(capsys.readouterr())
    assert not (tmp_path / "run" / "layer_gains.partial").exists()


def test_what_stops_layer_gains_finds_the_checkpoint_written_and_the_same_command_measures_on(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*finished[1], f"--trainer.default_root_dir={tmp_path / 'run'}"]
    probed: list[Any] = []
    divergences = evaluated.divergences_of_tokens

    def counted(*given: Any) -> torch.Tensor:
        probed.append(given)
        if len(probed) == 50:
            raise MobiqError("stopped")
        return divergences(*given)

    monkeypatch.setattr(evaluated, "divergences_of_tokens", counted)
    assert main(["fit", *arguments]) == 1
    assert (tmp_path / "run" / "elastic" / "config.json").is_file()
    assert not (tmp_path / "run" / "results.json").exists()
    assert main(["fit", *arguments]) == 0
    # 32 probes and 4 depths for either batch; 32 of the 50 were kept, and two batches' depths were begun again.
    assert len(probed) < 50 + 72 - 25
    one, other = ((run / "layer_gains.json").read_bytes() for run in (tmp_path / "run", finished[0]))
    assert one == other


def test_a_router_that_needs_gains_is_no_other_router_without_them(
    recipe_arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measured_gains, "whole_model_on_device", too_small)
    assert main(["fit", *recipe_arguments, *FAST, "--model.router=ProbedLayerRouter"]) != 0
    assert "ProbedLayerRouter needs layer gains, not measured: the whole model would take" in capsys.readouterr().err


def test_a_router_that_needs_probes_of_a_model_that_does_not_fit_is_refused_before_the_calibration(
    recipe_arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mobiq_lightning.callbacks.layer_gains.free_on_device", lambda _: 1000)
    assert main(["fit", *recipe_arguments, *FAST, "--model.router=ProbedLayerRouter"]) != 0
    said = capsys.readouterr().err
    assert "ProbedLayerRouter needs probes of the whole model, which take about 0.0 GB on cpu, of which 0.0 GB" in said


def test_learned_layers_without_a_stage_that_trains_them_are_refused(
    recipe_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *recipe_arguments, "--model.router=LearnedLayerRouter"]) != 0
    assert (
        "LearnedLayerRouter learns end to end, and no stage with scope model trains routers" in capsys.readouterr().err
    )


def test_one_slice_leaves_nothing_to_gain(recipe_arguments: list[str], tmp_path: Path) -> None:
    single = ["--model.router=StaticRouter", "--model.slices.init_args.slice_bits=[4]", "--model.eval_bits=[4]"]
    single += ["--model.budget={class_path: ConstantBudget, init_args: {bits: 4}}"]
    single += ["--model.objective.init_args.depth_weights={4: 1.0}"]
    assert main(["fit", *recipe_arguments, *FAST, *single]) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert {row["used_bits"] for row in rows if row["allocation"] in ("router", "layers", "shuffled")} == {4.0}


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(RecipeError, match="windows"):
        callback.LayerGains(windows=-1)
