"""What is noticed while a calibration does harm, and what is done about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mobiq_lightning.calibration.guarding import (
    CollapsedRouter,
    DepthShare,
    Measured,
    Probe,
    ProbeReading,
    WorseBlock,
    ends_quarter,
)
from mobiq_lightning.calibration.guarding.outlier_weight import outlier_ratio
from mobiq_lightning.calibration.sliced_source import SlicedSource
from mobiq_lightning.callbacks import Guards
from mobiq_lightning.cli import main
from mobiq_lightning.comparison.results import noticed_by_guards
from mobiq_lightning.errors import RecipeError
from mobiq_lightning.nn import BlockLayout
from mobiq_lightning.runs import GuardEvent, sentence
from mobiq_lightning.sources import load_source
from mobiq_lightning.strategies import MLPRouter, NoTransform, ResidualSlices, Router
from tests.checkpoints import tensors_of
from tests.conftest import Run

RUIN = [
    "--model.rates.ranges=100",
    "--model.stages=[{share: 1.0, train: [ranges, transforms]}]",
    "--model.epochs_per_block=2",
]
RUIN += ["--model.eval_bits=[2, 4]"]


def codes_of(run: Path) -> dict[str, Tensor]:
    return {
        k: v
        for k, v in tensors_of(run / "elastic").items()
        if any(part in k for part in ("plane_", "slice_scale", "slice_bias"))
    }


def assert_same_codes(one: Path, other: Path) -> None:
    first, second = codes_of(one), codes_of(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def guarded(**arguments: Any) -> str:
    """Guards with these arguments, silent about depths at which few bits have cost the model something."""
    arguments = {"worse_depth": "off", **arguments}
    callback = {"class_path": "mobiq_lightning.callbacks.Guards", "init_args": arguments}
    quick = {"class_path": "mobiq_lightning.callbacks.LatencyCheck", "init_args": {"seconds": 0}}
    return f"--trainer.callbacks={json.dumps([callback, quick])}"


def results_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "results.json").read_text()))


def resume_after(run: Path, epoch: int, folder: Path) -> Path:
    """A copy of a finished run as it was when it was killed after an epoch."""
    killed = shutil.copytree(run, folder)
    shutil.rmtree(killed / "elastic")
    (killed / "results.json").unlink()
    for path in (killed / "checkpoints").glob("*epoch-*"):
        if int(path.stem.rpartition("-")[2]) > epoch:
            path.unlink()
    assert list((killed / "checkpoints").glob("*.ckpt"))
    return killed


def in_folder(arguments: list[str], folder: Path) -> list[str]:
    return [*arguments, f"--trainer.default_root_dir={folder}"]


def test_a_healthy_run_names_only_depths_that_others_cost_something_and_logs_its_probe(finished: Run) -> None:
    events = results_of(finished[0])["guards"]
    assert {(e["guard"], e["action"], e["block"]) for e in events} == {("worse_depth", "record", 1)}
    assert [e["depth"] for e in events] == [6, 8]
    rows = {(r["allocation"], r["target_bits"]): r["kl"] for r in results_of(finished[0])["rows"]}
    assert rows["router", 8] > rows["rtn", 8]  # on other text, too
    journal = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    probes = [line for line in journal if "probe/perplexity_2_bits" in line]
    assert len(probes) == 2
    for line in probes:
        assert line["probe/perplexity_8_bits"] == pytest.approx(line["probe/perplexity_full"], rel=0.05)
    said = (finished[0] / "elastic" / "README.md").read_text()
    assert all(sentence(GuardEvent.from_json(event, "results.json")) in said for event in events)


def test_depths_are_judged_once_after_the_last_stage_that_moves_codes(
    recipe_arguments: list[str], tmp_path: Path
) -> None:
    block = "{share: null, epochs: 1, train: [ranges, transforms]}"
    model = "{share: null, epochs: 1, train: [ranges, transforms], depth: 2, scope: model}"
    arguments = [*recipe_arguments, "--model.eval_bits=[8]", guarded(worse_depth="record")]
    assert main(["fit", *arguments, f"--model.stages=[{block}, {model}]"]) == 0
    judged = [e for e in results_of(tmp_path / "run")["guards"] if e["guard"] == "worse_depth"]
    assert {(e["block"], e["epoch"]) for e in judged} == {(None, 2)}


def test_a_block_worse_than_rounding_falls_back_bit_by_bit_and_every_report_says_so(
    recipe_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    assert main(["fit", *recipe_arguments, *RUIN, guarded()]) == 0
    output = capsys.readouterr()
    assert "Worse than round-to-nearest: block 1 at 2 bits has a relative error of" in output.err
    events = results_of(run)["guards"]
    assert {(e["guard"], e["block"], e["action"]) for e in events} == {("worse_block", b, "repair") for b in (0, 1)}
    assert {e["epoch"] for e in events} == {1, 3}
    assert all(e["value"] > e["limit"] > 0 for e in events)
    for event in events:
        said = sentence(GuardEvent.from_json(event, "results.json"))
        assert said in (run / "elastic" / "README.md").read_text()
        assert said in output.out
    source = AutoModelForCausalLM.from_pretrained(recipe_arguments[2].partition("=")[2])
    saved = codes_of(run)
    bits = yaml.safe_load((run / "config.yaml").read_text())["model"]["slices"]["init_args"]["slice_bits"]
    linears = {n: m for n, m in source.named_modules() if ".layers." in n and isinstance(m, torch.nn.Linear)}
    assert len(linears) == 14
    for name, linear in linears.items():
        packed = ResidualSlices(linear.out_features, linear.in_features, bits, 16).pack(linear.weight)
        for plane, expected in enumerate(packed.planes):
            assert torch.equal(saved[f"{name}.plane_{plane}"], expected)
        assert torch.equal(saved[f"{name}.slice_scale"], packed.scale)
        assert torch.equal(saved[f"{name}.slice_bias"], packed.bias)


def test_stop_gives_the_numbers_and_the_same_command_goes_on_with_another_action(
    recipe_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*recipe_arguments, *RUIN]
    assert main(["fit", *arguments, guarded(worse_block="stop")]) == 1
    error = capsys.readouterr().err
    for part in ("block 1 at 2 bits has a relative error of", ", limit 0.", "(epoch 2 of 4)", "to repair or record"):
        assert part in error
    assert not (tmp_path / "run" / "results.json").exists()
    assert main(["fit", *arguments, guarded(worse_block="record", exploding_probe="record")]) == 0
    assert "Resuming from epoch-000000.ckpt" in capsys.readouterr().err
    assert {e["action"] for e in results_of(tmp_path / "run")["guards"]} == {"record"}
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["trainer"]["callbacks"][0]["init_args"]["worse_block"] == "record"


def test_a_resumed_run_with_repaired_blocks_ends_bit_by_bit_as_if_it_had_not_been_interrupted(
    recipe_arguments: list[str], tmp_path: Path
) -> None:
    # The first block falls back in the first sweep. A second sweep must leave it alone, in both runs.
    stages = "--model.stages=[{epochs: 1, train: [codes, ranges], depth: 2}, {epochs: 1, train: [codes], depth: 2, "
    stages += "scope: model}, {epochs: 2, train: [codes, ranges], depth: 3}]"
    slices = "--model.slices={class_path: ProgressiveSlices, init_args: {slice_bits: [2, 1, 1, 2, 2], group_size: 16}}"
    arguments = [*recipe_arguments, *RUIN, stages, slices, guarded()]
    whole = tmp_path / "whole"
    assert main(["fit", *in_folder(arguments, whole)]) == 0
    events = results_of(whole)["guards"]
    assert {e["block"] for e in events if e["action"] == "repair" and e["epoch"] < 2} == {0, 1}
    killed = resume_after(whole, 5, tmp_path / "killed")
    assert main(["fit", *in_folder(arguments, killed)]) == 0
    assert_same_codes(whole, killed)
    assert results_of(killed)["guards"] == events
    assert results_of(killed)["rows"] == results_of(whole)["rows"]


def test_a_model_stage_that_makes_the_model_worse_is_taken_back_also_after_a_resume(
    recipe_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [*recipe_arguments, "--model.eval_bits=[2, 4]", guarded()]
    blocks = "{share: null, epochs: 1, train: [ranges, transforms]}"
    bad = "{share: null, epochs: 3, train: [ranges, transforms], depth: 2, scope: model, lr_scale: 10000}"
    without, whole = tmp_path / "without", tmp_path / "whole"
    assert main(["fit", *in_folder([*common, f"--model.stages=[{blocks}]"], without)]) == 0
    arguments = [*common, f"--model.stages=[{blocks}, {bad}]"]
    assert main(["fit", *in_folder(arguments, whole)]) == 0
    assert "the whole model at" in capsys.readouterr().err
    assert {(e["guard"], e["block"], e["action"]) for e in results_of(whole)["guards"]} == {
        ("worse_block", None, "repair")
    }
    assert_same_codes(without, whole)
    killed = resume_after(whole, 3, tmp_path / "killed")  # in the middle of the bad stage
    assert main(["fit", *in_folder(arguments, killed)]) == 0
    assert_same_codes(without, killed)


class ExplodingSlices(ResidualSlices):
    """As soon as it has learned anything, overflows wherever it is not trained."""

    def weight_at(self, weight: Tensor, n_slices: int) -> Tensor:
        overflows = not torch.is_grad_enabled() and bool(self.low_clip.any())
        return super().weight_at(weight, n_slices) * (torch.inf if overflows else 1)


@pytest.mark.parametrize("action", ["stop", "repair"])
def test_an_exploding_probe_is_noticed_at_the_first_block(
    recipe_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    slices = f"--model.slices={{class_path: {__name__}.ExplodingSlices, init_args: {{group_size: 16}}}}"
    guard = guarded(worse_block="off", exploding_probe=action)
    code = main(["fit", *recipe_arguments, *RUIN, "--model.rates.ranges=0.02", slices, guard])
    error = capsys.readouterr().err
    assert "Exploding perplexity: not finite" in error
    assert "after block 1, at 2 bits" in error
    if action == "stop":
        assert code == 1
        assert "(epoch 2 of 4); the run stops" in error
        assert not list((tmp_path / "run" / "elastic.partial").glob("*.safetensors"))
    else:
        assert code == 0
        events = results_of(tmp_path / "run")["guards"]
        assert {(e["guard"], e["block"], e["action"]) for e in events} == {
            ("exploding_probe", block, "repair") for block in (0, 1)
        }
        assert {e["value"] for e in events} == {None}


def test_the_way_through_all_blocks_is_taken_at_four_of_many_and_where_a_block_drifts_from_full_precision(
    make_model: Callable[..., Path],
) -> None:
    ends = lambda count: [block for block in range(count) if ends_quarter(block, count)]
    assert (ends(2), ends(4), ends(30)) == ([0, 1], [0, 1, 2, 3], [7, 14, 22, 29])
    sliced = SlicedSource(
        load_source(str(make_model())),
        BlockLayout(),
        nn.ModuleList(),
        slices=partial(ResidualSlices, group_size=16),
        router=MLPRouter,
        transform=NoTransform(),
        share_routers="input",
    )
    sliced.slice_blocks()
    sliced.make_caller(torch.device("cpu"), ())
    probe = Probe(sliced, torch.arange(3, 35)[None], (2, 8), batch_size=1)
    alike = probe.measure_block(others_sliced=False, model=None)  # what is calibrated begins as what is rounded
    assert (len(alike.error), alike.perplexity, alike.kl) == (4, {}, {})
    assert len(probe.measure_block(others_sliced=False, model=True).perplexity) == 4
    for linear in sliced.block_at(0).sliced_linears():
        linear.scheme.low_clip.data.fill_(5.0)  # type: ignore[union-attr, operator]
    worse = probe.measure_block(others_sliced=False, model=None)
    assert len(worse.perplexity) == 4
    assert probe.measure_block(others_sliced=False, model=False).perplexity == {}


def test_a_block_that_is_measured_alone_owes_nothing_to_the_blocks_beside_it(make_model: Callable[..., Path]) -> None:
    sliced = SlicedSource(
        load_source(str(make_model(num_hidden_layers=3))),
        BlockLayout(),
        nn.ModuleList(),
        slices=partial(ResidualSlices, group_size=16),
        router=MLPRouter,
        transform=NoTransform(),
        share_routers="input",
    )
    sliced.slice_blocks()
    sliced.make_caller(torch.device("cpu"), ())

    def measured(alone: bool) -> Any:
        probe = Probe(sliced, torch.arange(3, 35)[None], (2, 8), batch_size=1, alone=alone)
        probe.measure_block(others_sliced=False)
        probe.advance(1)
        return probe.measure_block(others_sliced=True)

    before, among_others = measured(True), measured(False)
    for block in (0, 2):
        for linear in sliced.block_at(block).sliced_linears():
            linear.scheme.low_clip.data.fill_(-3.0)  # type: ignore[union-attr, operator]
    assert measured(True) == before
    assert measured(False) != among_others


class ConstantRouter(Router):
    """Cannot tell tokens apart."""

    def scores(self, x: Tensor) -> Tensor:
        return -torch.arange(self.n_slices - 1.0).expand(*x.shape[:-1], -1)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("action", ["stop", "repair", "record", "off"])
def test_a_collapsed_router_is_noticed_when_its_block_is_done(
    recipe_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str, rounds: int
) -> None:
    callbacks = guarded(collapsed_router=action)[:-1]
    callbacks += (
        f', {{"class_path": "mobiq_lightning.callbacks.ThresholdTuning", "init_args": {{"rounds": {rounds}}}}}]'
    )
    router = f"--model.router={__name__}.ConstantRouter"
    code = main(["fit", *recipe_arguments, router, callbacks])
    error = capsys.readouterr().err
    assert code == (1 if action == "stop" else 0)
    assert ("Router collapse: at 2.25 bits, 100.0% of the tokens of model.layers.0.self_attn.q_proj" in error) == (
        action != "off"
    )
    if action == "stop":
        assert "(epoch 2 of 4)" in error  # not at the end of the run
        return
    results = results_of(tmp_path / "run")
    events = results["guards"]
    assert [e["action"] for e in events] == ([] if action == "off" else [action] * 8)
    assert {e["epoch"] for e in events} == (set() if action == "off" else {1, 3})
    assert len(results["collapsed"]) == len(events)
    row = next(r for r in results["rows"] if r["allocation"] == "router" and r["target_bits"] == 2.5)
    # Left alone, all tokens of all inputs read the same depth.
    assert (row["used_bits"] == pytest.approx(2.5, abs=0.1)) == (action == "repair")


def with_weights(folder: Path, to: Path, change: Any) -> str:
    """The argument for a copy of a model with other weights."""
    copy = shutil.copytree(folder, to)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return f"--model.pretrained={copy}"


def test_one_weight_that_costs_its_neighbours_their_bits_is_recorded_with_its_linear(
    recipe_arguments: list[str], make_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.1.mlp.down_proj"
    model = with_weights(
        make_model(), tmp_path / "m", lambda tensors: tensors[f"{name}.weight"][3].narrow(0, 5, 1).fill_(1e4)
    )
    quick = ["--model.eval_bits=[2]", "--data.eval_max_windows=2", "--model.random_seeds=[]"]
    assert main(["fit", *recipe_arguments, model, guarded(), *quick]) == 0
    assert f"Outlier weight: the largest weight of {name} is" in capsys.readouterr().err
    events = [e for e in results_of(tmp_path / "run")["guards"] if e["guard"] == "outlier_weight"]
    assert [(e["block"], e["input"], e["action"], e["depth"], e["limit"]) for e in events] == [
        (1, name, "record", 8, 1000)
    ]
    assert 1e4 < events[0]["value"] < 1e6
    said = sentence(GuardEvent.from_json(events[0], "results.json"))
    assert "rounds the others of its group to one value, at all depths up to 8 bits" in said
    assert said in (tmp_path / "run" / "elastic" / "README.md").read_text()


def test_float16_that_overflows_is_named_before_training_and_learning_rates_are_not(
    recipe_arguments: list[str], make_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        for part in ("gate_proj", "up_proj"):
            tensors[f"model.layers.1.mlp.{part}.weight"].mul_(300)

    model = with_weights(make_model(dtype=torch.float16), tmp_path / "m", enlarge)
    assert main(["fit", *recipe_arguments, model]) == 1
    error = capsys.readouterr().err
    assert "block 2/2 gives" in error
    assert "mlp.down_proj was given numbers up to" in error
    assert "computes in float16, which ends at 65504. Use model.dtype bfloat16 or float32" in error
    assert "rates" not in error
    assert "epoch" not in error.split("block 2/2")[1]


class TestOutliers:
    @pytest.mark.parametrize("rows", [1, 8, 256])
    def test_ordinary_weights_have_none(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(rows, 512, generator=generator)
        heavy = normal / torch.rand(rows, 512, generator=generator).pow(
            0.25
        )  # tails of Student's t, 4 degrees of freedom
        scales = torch.logspace(-2, 2, rows)[:, None]  # rows of very different size
        for weight in (normal, heavy, normal * scales, (normal * 1e4).bfloat16(), torch.zeros(rows, 512)):
            assert outlier_ratio(weight) < 100

    def test_one_far_larger_than_the_others_is_one_and_a_large_row_is_none(self) -> None:
        weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
        weight[3, 5] = -1e4
        assert 1e4 < outlier_ratio(weight) < 2e4
        weight[3] = 1e4
        assert outlier_ratio(weight) == 1
        weight[:40] = 0  # most rows are dead: nothing is typical
        assert outlier_ratio(weight) == 0


def test_a_comparison_says_in_which_runs_guards_noticed_something() -> None:
    event = GuardEvent("worse_block", 0, None, "repair", epoch=1, depth=2, value=0.3, limit=0.2)
    noticed = {"a-0": (event, event), "a-1": ()}
    cells: Any = [SimpleNamespace(name=name) for name in [*noticed, "unfinished"]]
    measured = {name: SimpleNamespace(guards=events) for name, events in noticed.items()}
    folder: Any = SimpleNamespace(
        whole=lambda cells: [c for c in cells if c.name in measured], measured=lambda c: measured[c.name]
    )
    assert noticed_by_guards(folder, cells) == [
        "a-0: guards noticed 2 x worse_block (repair); its run folder's results.json says where."
    ]


class TestLimits:
    @pytest.mark.parametrize(("value", "events"), [(0.2099, 0), (0.2101, 1), (float("nan"), 1)])
    def test_the_lowest_depth_may_be_worse_by_twice_the_tolerance(self, value: float, events: int) -> None:
        found = Measured(error={("calibrated", 2): value, ("rounded", 2): 0.2})
        assert len(WorseBlock("record", 0.025).look(ProbeReading(found, [2]))) == events

    @pytest.mark.parametrize(("value", "events"), [(0.0100, 0), (0.0103, 1)])
    def test_a_high_depth_may_be_worse_by_a_part_of_the_error_at_the_lowest(self, value: float, events: int) -> None:
        error = {("calibrated", 8): value, ("rounded", 8): 0.0001, ("calibrated", 2): 0.1, ("rounded", 2): 0.2}
        looked = ProbeReading(Measured(error=error), [2, 8])  # type: ignore[arg-type]
        assert len(Guards().worse_block.look(looked)) == events

    @pytest.mark.parametrize(("value", "events"), [(0.000104, 0), (0.000106, 1), (float("nan"), 1)])
    def test_a_depth_is_compared_with_its_own_rounding_alone(self, value: float, events: int) -> None:
        kl = {("calibrated", 8): value, ("rounded", 8): 0.0001, ("calibrated", 2): 0.1, ("rounded", 2): 0.2}
        seen = Guards().worse_depth.look(ProbeReading(Measured(kl=kl), [2, 8]))  # type: ignore[arg-type]
        assert [s.depth for s in seen] == [8] * events

    @pytest.mark.parametrize(("value", "events"), [(199.0, 0), (201.0, 1), (float("inf"), 1)])
    def test_a_probe_explodes_above_its_factor(self, value: float, events: int) -> None:
        found = Measured(perplexity={("calibrated", 2): value, ("rounded", 2): 100.0})
        assert len(Guards().exploding_probe.look(ProbeReading(found, [2]))) == events

    @pytest.mark.parametrize(("share", "events"), [(0.995, 0), (0.9951, 1), (1.0, 1)])
    def test_a_router_has_collapsed_above_its_share(self, share: float, events: int) -> None:
        sightings = CollapsedRouter("record").look(DepthShare("a", 2.5, share))
        assert [(s.input, s.depth, s.value, s.limit) for s in sightings] == [("a", 2.5, share, 0.995)] * events

    @pytest.mark.parametrize(
        "arguments",
        [
            {"worse_tolerance": -1},
            {"worse_tolerance": float("nan")},
            {"probe_factor": 1},
            {"probe_factor": float("nan")},
            {"windows": 0},
        ],
    )
    def test_arguments_that_mean_nothing_are_refused(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(RecipeError, match=next(iter(arguments))):
            Guards(**arguments)
