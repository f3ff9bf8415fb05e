"""Formulas of memory, beside what is there."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mobiq_lightning.calibration.block_caller import BlockCaller
from mobiq_lightning.calibration.hidden_states import BlockInputs, HiddenStates
from mobiq_lightning.calibration.planning.compared import PhaseMemory, comparison_memory
from mobiq_lightning.calibration.planning.memory import n_streams, n_tables
from mobiq_lightning.calibration.schedule import Stage
from mobiq_lightning.jobs import ElasticCLI, run_check
from mobiq_lightning.jobs.quiet import quiet_libraries
from mobiq_lightning.sources import load_source


@pytest.mark.parametrize("n_blocks", [1, 2, 3])
@pytest.mark.parametrize(("streams", "inputs"), [(1, "calibrated"), (2, "calibrated"), (6, "calibrated"), (6, "full")])
def test_so_many_tables_of_hidden_states_are_alive_at_once(
    n_blocks: int,
    streams: int,
    inputs: BlockInputs,
    make_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_source(str(make_model())).model
    blocks = [copy.deepcopy(model.model.layers[i % 2]) for i in range(n_blocks)]
    model.model.layers, model.config.num_hidden_layers = nn.ModuleList(blocks), n_blocks
    live: set[int] = set()
    peak, place = 0, HiddenStates._place

    def counted(self: HiddenStates, table: torch.Tensor, name: str) -> torch.Tensor:
        nonlocal peak
        made = place(self, table, name)
        live.add(id(made))
        weakref.finalize(made, live.discard, id(made))
        peak = max(peak, len(live))
        return made

    monkeypatch.setattr(HiddenStates, "_place", counted)

    def reading(block: int, batch: int) -> Any:
        return nullcontext()

    names = dict.fromkeys(map(str, range(streams)), reading)
    hidden = HiddenStates(
        BlockCaller(model, blocks, torch.device("cpu")),
        torch.randint(3, 300, (4, 8)),
        names,
        reading,
        2,
        block_inputs=inputs,
    )
    hidden.advance(n_blocks - 1)
    stages = [Stage(train=["codes"], depth=2, other_depths=dict.fromkeys(range(3, 2 + streams), 1.0))]
    assert n_streams(stages, (), inputs) == (0 if inputs == "full" else streams)
    assert peak == n_tables(n_streams(stages, (), inputs), n_blocks)


def needs(recipe: list[str], *changes: str) -> dict[str, int]:
    report = run_check([*recipe, *changes])
    assert report.problems == []
    assert report.plan is not None
    plan = report.plan
    return {phase.name: phase.host for phase in plan.memory}


def test_tables_on_the_host_count_as_memory_and_tables_on_disk_as_disk(recipe_arguments: list[str]) -> None:
    host, disk = (run_check([*recipe_arguments, f"--model.hidden_states={where}"]).plan for where in ("host", "disk"))
    assert host is not None
    assert disk is not None
    table = 8 * 32 * 32 * 4  # windows, tokens, width, bytes
    streams = 4  # depths 2, 4 and 8, and routed
    assert host.memory[0].host - disk.memory[0].host == (streams + 1) * table
    assert disk.disk - host.disk == (streams + 1) * table
    assert (host.memory[0].tables, disk.memory[0].tables) == ((streams + 1) * table, 0)
    full = run_check([*recipe_arguments, "--model.block_inputs=full"]).plan
    assert full is not None
    assert full.memory[0].tables == 2 * table


def test_codes_that_wait_for_a_later_sweep_keep_target_and_averages(recipe_arguments: list[str]) -> None:
    slices = "--model.slices=ProgressiveSlices"
    codes = "{train: [codes], depth: 2, epochs: 1}"
    routers = "{train: [routers], epochs: 1, scope: model}"
    later = "{train: [codes], depth: 3, epochs: 1}"
    once = needs(recipe_arguments, slices, f"--model.stages=[{codes}, {routers}]")
    twice = needs(recipe_arguments, slices, f"--model.stages=[{codes}, {routers}, {later}]")
    assert twice["block stages"] - once["block stages"] == 12 * (4 * 32 * 32 + 4 * 16 * 32 + 6 * 32 * 44)


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (
            25e9,
            "30.0 GB on the host, of which 25.0 GB are free; 15.0 GB are hidden states: set model.hidden_states to disk, or",
        ),
        (
            10e9,
            "30.0 GB on the host, of which 10.0 GB are free; 15.0 GB are hidden states: set model.hidden_states to disk, and",
        ),
    ],
)
def test_where_hidden_states_do_not_fit_the_disk_is_named(free: float, said: str, recipe_arguments: list[str]) -> None:
    plan = run_check(recipe_arguments).plan
    assert plan is not None
    phase = PhaseMemory("block stages", host=int(30e9), device=0, tables=int(15e9))
    short = replace(plan, memory=[phase], memory_free=(int(free), None)).shortages("cpu")
    assert short == [
        f"memory: block stages will take about {said} lower data.n_samples, data.seq_len or data.batch_size"
    ]


def test_a_comparison_that_does_not_fit_on_the_device_goes_block_by_block_and_says_so(
    recipe_arguments: list[str],
) -> None:
    plan = run_check(recipe_arguments).plan
    with quiet_libraries():
        job = ElasticCLI("build", recipe_arguments)
    assert plan is not None

    def need(free: int | None) -> PhaseMemory:
        return comparison_memory(plan.sizes, job.model, job.datamodule, "cuda", free)

    assert need(1000) == need(None)  # hidden states of all passes would take more than the model, which is small
    job.datamodule.eval_batch_size, job.datamodule.eval_seq_len = 1, 4
    whole = need(None)
    assert need(whole.device) == whole
    free = whole.device - 1
    by_block = need(free)
    assert (whole.whole, by_block.whole) == (0, whole.device)
    assert by_block.device < whole.device
    # The checkpoint, which would lie on the device alone: planes, a byte for each weight, and what is not in blocks.
    assert by_block.host - whole.host > plan.sizes.sliced
    found = replace(plan, memory=[by_block], memory_free=(None, free))
    assert found.shortages("cuda:0") == []
    (line,) = found.by_block("cuda:0")
    assert line.startswith("comparison: the whole model would take about 0.0 GB on cuda:0, of which 0.0 GB are free")
    assert line.endswith("Speed is not measured")
    (short,) = replace(found, memory_free=(None, 1000)).shortages("cuda:0")
    assert short.startswith("memory: comparison will take about 0.0 GB on cuda:0")


def test_layer_gains_are_left_out_where_they_do_not_fit_unless_the_router_needs_probes(
    recipe_arguments: list[str],
) -> None:
    for router, short in (("MLPRouter", 0), ("GradientLayerRouter", 0), ("ProbedLayerRouter", 1)):
        plan = run_check([*recipe_arguments, f"--model.router={router}"]).plan
        assert plan is not None
        gains = [replace(phase, device=int(30e9)) for phase in plan.memory if phase.name == "layer gains"]
        found = replace(plan, memory=gains, memory_free=(None, int(20e9))).shortages("cuda")
        assert len(found) == short
