"""The main job, end to end, on small models: fit, validate, generate, and what stands in the way of them."""

from __future__ import annotations

import csv
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mobiq_lightning.calibration import SafeCheckpointIO
from mobiq_lightning.checkpoint import load
from mobiq_lightning.cli import main
from mobiq_lightning.evaluation import RTN_BITS
from mobiq_lightning.jobs.damaged_run import results_fit
from mobiq_lightning.nn import SlicedLinear, fixed_depth, routed_inputs
from mobiq_lightning.packing import unpack_codes
from mobiq_lightning.runs import RunFolder, read_diagnostics, read_results
from mobiq_lightning.runtime import Dial
from mobiq_lightning.serving import BitsPolicy
from tests.checkpoints import tensors_of
from tests.conftest import Run, for_others


def test_the_router_that_the_guide_shows_is_used_from_a_recipe_by_its_path(
    recipe_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "developer" / "add-a-router.md").read_text()
    example = guide.split("```python\n")[1].split("```")[0]
    assert example.startswith("# my_routers.py")
    package = tmp_path / "plugins"
    package.mkdir()
    (package / "my_routers.py").write_text(example)
    monkeypatch.syspath_prepend(str(package))
    router = "--model.router={class_path: my_routers.PeakRouter, init_args: {step: 0.25}}"
    assert main(["fit", *recipe_arguments, router]) == 0
    inputs = routed_inputs(load(tmp_path / "run", trust_router="my_routers.PeakRouter"))
    assert {type(routed.router).__name__ for routed in inputs} == {"PeakRouter"}
    assert {routed.router.step for routed in inputs} == {0.25}
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    used = next(r["used_bits"] for r in rows if r["allocation"] == "router" and r["target_bits"] == 2.5)
    assert used == pytest.approx(2.5, abs=0.2)


def levels_of(run: Path) -> list[float]:
    """Bits that a server may run at, whatever speeds say on this machine."""
    elastic = run / "elastic"
    (elastic / "speed.json").rename(run / "aside")
    try:
        return [level.bits for level in BitsPolicy.from_checkpoint(run, max_perplexity_ratio=100).levels]
    finally:
        (run / "aside").rename(elastic / "speed.json")


class TestResults:
    def test_every_allocation_has_a_row_at_every_budget(self, finished: Run) -> None:
        results = json.loads((finished[0] / "results.json").read_text())
        rows = {(r["allocation"], r["target_bits"], r["seed"]) for r in results["rows"]}
        expected = {("full", 32.0, None)} | {("rtn", float(b), None) for b in RTN_BITS}
        for bits in (2.0, 2.5, 8.0):
            expected |= {(name, bits, 0) for name in ("router", "static", "layers", "shuffled", "random")}
        assert rows == expected
        assert set(results["rows"][0]) == {
            "allocation", "target_bits", "used_bits", "all_in_bits", "perplexity", "kl", "seed"
        }  # fmt: skip

    def test_the_protocol_says_what_the_figures_are_of(self, finished: Run) -> None:
        protocol = json.loads((finished[0] / "results.json").read_text())["protocol"]
        assert protocol["window"] == 64
        assert protocol["bos"] is True
        assert protocol["n_windows"] == 8
        assert len(protocol["tokenizer"]) == 16

    def test_controls_spend_the_bits_that_the_router_used(self, finished: Run) -> None:
        rows = json.loads((finished[0] / "results.json").read_text())["rows"]
        used = {(r["allocation"], r["target_bits"]): r["used_bits"] for r in rows}
        for bits in (2.0, 2.5, 8.0):
            assert used["random", bits] == pytest.approx(used["router", bits], abs=0.03)
            assert used["static", bits] == pytest.approx(used["router", bits], abs=0.06)

    def test_at_the_ends_of_the_range_all_allocations_are_one(self, finished: Run) -> None:
        rows = json.loads((finished[0] / "results.json").read_text())["rows"]
        for bits in (2.0, 8.0):
            ends = [r for r in rows if r["target_bits"] == bits and r["allocation"] not in ("full", "rtn")]
            assert len(ends) == 5
            assert {r["used_bits"] for r in ends} == {bits}
            assert max(r["perplexity"] for r in ends) == pytest.approx(min(r["perplexity"] for r in ends), rel=1e-6)

    def test_full_precision_is_measured_as_transformers_would(self, finished: Run) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        run, _ = finished
        config = yaml.safe_load((run / "config.yaml").read_text())
        model = AutoModelForCausalLM.from_pretrained(config["model"]["pretrained"])
        tokenizer = AutoTokenizer.from_pretrained(config["model"]["pretrained"])
        documents = Path(config["data"]["eval_source"]).read_text().split("\n<|endoftext|>\n")[:8]
        nll, count = 0.0, 0
        for document in documents:
            ids = torch.tensor([tokenizer(document.strip("\n"))["input_ids"][:64]])  # this tokenizer adds BOS itself
            with torch.no_grad():
                loss = model(input_ids=ids, labels=ids).loss
            nll, count = nll + float(loss) * (ids.shape[1] - 1), count + ids.shape[1] - 1
        results = json.loads((run / "results.json").read_text())
        full = next(r for r in results["rows"] if r["allocation"] == "full")
        assert results["protocol"]["n_tokens"] == count
        assert full["perplexity"] == pytest.approx(torch.tensor(nll / count).exp().item(), rel=1e-4)
        assert full["kl"] == 0.0

    def test_all_in_bits_count_scales_and_routers(self, finished: Run) -> None:
        run, _ = finished
        rows = json.loads((run / "results.json").read_text())["rows"]
        tensors = tensors_of(run / "elastic")
        columns = {
            32 // 8: 32,
            -(-44 // 8): 44,
        }  # by the bytes of a plane's row: eight columns in each, the last padded
        n_weights = sum(v.shape[0] * columns[v.shape[1]] for k, v in tensors.items() if k.endswith("plane_0"))
        scales = sum(v.numel() * 16 for k, v in tensors.items() if "slice_scale" in k or "slice_bias" in k)
        of_routers = [v for k, v in tensors.items() if ".router." in k]
        assert {v.dtype for v in of_routers} == {torch.bfloat16}
        routers = sum(v.numel() * 16 for v in of_routers)
        router = next(r for r in rows if r["allocation"] == "router" and r["target_bits"] == 8)
        static = next(r for r in rows if r["allocation"] == "static" and r["target_bits"] == 8)
        assert static["all_in_bits"] == pytest.approx(8 + scales / n_weights)
        assert router["all_in_bits"] == pytest.approx(8 + (scales + routers) / n_weights)

    def test_table_plot_and_journal_are_written(self, finished: Run) -> None:
        run, _ = finished
        with (run / "results.csv").open() as file:
            assert len(list(csv.DictReader(file))) == len(json.loads((run / "results.json").read_text())["rows"])
        assert (run / "results.png").read_bytes().startswith(b"\x89PNG")
        journal = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert any(key.startswith("block/loss") for line in journal for key in line)
        assert any("eval/ppl" in line for line in journal)
        assert any(key.startswith("threshold/4_bits/") for line in journal for key in line)
        assert any(key.startswith("used_bits/model.layers.0") for line in journal for key in line)
        assert list((run / "csv").rglob("metrics.csv"))


class TestCheckpoint:
    def test_the_loaded_model_is_the_calibrated_one_at_every_budget_and_depth(self, finished: Run) -> None:
        """What was trained (ranges in the last training checkpoint) is what the saved planes hold, bit by bit."""
        from mobiq_lightning.nn import BlockLayout, CalibratedBlock
        from mobiq_lightning.sources import load_source
        from mobiq_lightning.strategies import MLPRouter, ResidualSlices

        run, _ = finished
        config = yaml.safe_load((run / "config.yaml").read_text())
        source = load_source(config["model"]["pretrained"])
        state = SafeCheckpointIO().load_checkpoint(max((run / "checkpoints").glob("epoch-*.ckpt")))["state_dict"]
        layers = source.model.model.layers
        scheme = functools.partial(ResidualSlices, **config["model"]["slices"]["init_args"])
        router = functools.partial(MLPRouter, **config["model"]["router"]["init_args"])
        for index, block in enumerate(layers):
            groups = BlockLayout().group_linears(block, "input")
            learned = CalibratedBlock(block, groups, scheme, router)
            prefix = f"blocks.{index}."
            learned.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        elastic = load(run)
        ids = torch.randint(3, 300, (2, 20))
        calibrated = Dial(routed_inputs(source.model))
        for budget in routed_inputs(source.model)[0].budgets.tolist():
            calibrated.set_bits(budget)
            with torch.no_grad(), elastic.bits(budget):
                assert torch.equal(source.model(ids).logits, elastic(ids).logits)
        for bits in (2, 3, 6, 8):
            with (
                torch.no_grad(),
                fixed_depth(routed_inputs(source.model), bits),
                fixed_depth(routed_inputs(elastic), bits),
            ):
                assert torch.equal(source.model(ids).logits, elastic(ids).logits)
        sliced = layers[0].mlp.down_proj
        assert isinstance(sliced, SlicedLinear)
        packed = elastic.model.layers[0].mlp.down_proj.packed
        assert torch.equal(unpack_codes(packed.planes, 44), unpack_codes(sliced.scheme.pack(sliced.weight).planes, 44))

    def test_calibration_beats_rounding_where_it_was_asked_to(self, finished: Run) -> None:
        rows = json.loads((finished[0] / "results.json").read_text())["rows"]
        kl = {(r["allocation"], r["target_bits"]): r["kl"] for r in rows}
        assert kl["static", 2.0] < kl["rtn", 2.0]

    def test_tokenizer_and_generation_config_come_along(self, finished: Run) -> None:
        elastic = finished[0] / "elastic"
        source = Path(yaml.safe_load((finished[0] / "config.yaml").read_text())["model"]["pretrained"])
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (elastic / name).read_bytes() == (source / name).read_bytes()


class TestGenerate:
    def test_it_continues_the_prompt_and_says_the_bits_used(
        self, finished: Run, capsys: pytest.CaptureFixture[str]
    ) -> None:
        capsys.readouterr()
        assert (
            main(["generate", str(finished[0]), "--prompt", "import sys", "--bits", "2.5", "--max_new_tokens", "5"])
            == 0
        )
        output = capsys.readouterr()
        assert output.out.startswith("import sys")
        assert "[2.5 bits asked for; used 2." in output.err

    def test_the_ends_of_the_range_use_exactly_what_is_asked(self, finished: Run) -> None:
        from mobiq_lightning.serving import continue_prompt

        for bits in (2.0, 8.0):
            text, used = continue_prompt(str(finished[0]), "def", bits, 4, temperature=0.7, seed=1)
            assert used.code_bits == bits
            assert text == continue_prompt(str(finished[0]), "def", bits, 4, temperature=0.7, seed=1)[0]

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--prompt", "a", "--bits", "9"], 2, "--bits: '9'; a number above 0 and at most 8"),
            (["--prompt", "a", "--bits", "1.5"], 1, "1.5 bits asked for; this model holds 2 to 8"),
            (["--prompt", "a", "--bitz", "3"], 2, "generate:"),
            (["--prompt", "a", "--bits", "many"], 2, "generate:"),
        ],
    )
    def test_what_cannot_be_generated_is_answered_in_a_line(
        self, finished: Run, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["generate", str(finished[0]), *arguments]) == code
        assert message in capsys.readouterr().err

    def test_a_folder_without_a_run_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["generate", str(tmp_path), "--prompt", "a"]) == 1
        assert "holds no elastic checkpoint" in capsys.readouterr().err


class TestRunFolder:
    def test_the_same_command_on_a_finished_run_prints_its_table_and_changes_nothing(
        self, finished: Run, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = (finished[0] / "results.json").read_bytes()
        assert main(["fit", *finished[1]]) == 0
        output = capsys.readouterr()
        assert "finished" in output.err
        assert "round to nearest" in output.out
        assert (finished[0] / "results.json").read_bytes() == before

    def test_the_written_recipe_is_whole_and_runs_again(
        self, finished: Run, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["fit", "--config", str(finished[0] / "config.yaml")]) == 0
        assert "finished" in capsys.readouterr().err

    def test_another_recipe_in_the_same_folder_is_refused_with_the_keys(
        self, finished: Run, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["fit", *finished[1], "--model.rates.ranges=0.5", "--data.seed=3"]) == 1
        error = capsys.readouterr().err
        assert "model.rates.ranges: 0.02 -> 0.5" in error
        assert "data.seed: 0 -> 3" in error
        assert "--overwrite" in error

    def test_validate_at_other_bits_puts_rows_beside_those_of_the_run(
        self, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = shutil.copytree(finished[0], tmp_path / "copy")
        before = json.loads((run / "results.json").read_text())
        levels = levels_of(run)
        arguments = ["--config", str(run / "config.yaml"), f"--trainer.default_root_dir={run}"]
        assert main(["validate", *arguments, "--model.eval_bits=[2, 3.25]", "--model.rates.codes=0.5"]) == 0
        said = capsys.readouterr().err
        assert "Measured now: 2, 3.25 bits. As they were measured before: 2.5, 8 bits." in said
        assert "validate compares the checkpoint as it is; without effect:\n  model.rates.codes: 0.001 -> 0.5\n" in said
        assert "eval_bits" not in said
        after = json.loads((run / "results.json").read_text())
        assert [row for row in after["rows"] if row["target_bits"] != 3.25] == before["rows"]
        assert {row["allocation"] for row in after["rows"] if row["target_bits"] == 3.25} == {
            "router", "static", "layers", "shuffled", "random"
        }  # fmt: skip
        assert [entry["budgets"] for entry in after["additions"]] == [[2, 3.25]]
        assert after["environment"] == before["environment"]
        assert read_results(run / "elastic" / "results.json") == for_others(run / "results.json")
        assert set(levels) <= set(levels_of(run))
        with (run / "results.csv").open() as file:
            assert len(list(csv.DictReader(file))) == len(after["rows"])
        card = (run / "elastic" / "README.md").read_text()
        assert "| router | 2.5 |" in card
        assert "| router | 3.25 |" in card
        assert [b["target_bits"] for b in json.loads((run / "diagnostics.json").read_text())["budgets"]] == [
            2, 2.5, 3.25, 8
        ]  # fmt: skip
        speeds = json.loads((run / "elastic" / "speed.json").read_text())["rows"]
        assert {2, 8} <= {row["bits"] for row in speeds}

    def test_validate_on_other_text_writes_beside_and_leaves_what_the_checkpoint_says(
        self, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = shutil.copytree(finished[0], tmp_path / "copy")
        text = tmp_path / "other.txt"
        text.write_text("The other text. " * 200)
        own = [run / name for name in ("results.json", "results.csv", "results.png", "diagnostics.json")]
        own += [run / "elastic" / name for name in ("results.json", "README.md")]
        before = [path.read_bytes() for path in own]
        arguments = ["--config", str(run / "config.yaml"), f"--trainer.default_root_dir={run}"]
        other = [f"--data.eval_source={text}", "--data.eval_protocol=packed", "--data.eval_seq_len=32"]
        assert main(["validate", *arguments, *other, "--model.eval_bits=[3]"]) == 0
        assert "the results of the run and of its checkpoint stay as they are" in capsys.readouterr().err
        assert [path.read_bytes() for path in own] == before
        assert main(["validate", *arguments, *other, "--model.eval_bits=[4]"]) == 0
        (beside,) = (run / "other_protocols").iterdir()
        assert beside.name.startswith("other-window-32-")
        found = read_results(beside / "results.json").measured
        assert found is not None
        assert {row.target_bits for row in found.rows if row.allocation == "router"} == {3, 4}
        assert [b.target_bits for b in read_diagnostics(beside / "diagnostics.json").budgets] == [3, 4]
        assert (beside / "results.png").is_file()
        assert [path.read_bytes() for path in own] == before

    def test_results_say_which_checkpoint_they_are_of(
        self, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stored = json.loads((finished[0] / "results.json").read_text())
        assert results_fit(RunFolder(finished[0]))
        assert capsys.readouterr().err == ""
        run = tmp_path / "run"
        run.mkdir()
        (run / "elastic").symlink_to(finished[0] / "elastic")
        for checkpoint, fits in (("another", False), (None, True), (stored["checkpoint"], True)):
            (run / "results.json").write_text(json.dumps({**stored, "checkpoint": checkpoint}))
            assert results_fit(RunFolder(run)) is fits
        assert "it is compared again" in capsys.readouterr().err

    def test_results_of_a_checkpoint_that_was_built_anew_are_replaced(
        self, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = shutil.copytree(finished[0], tmp_path / "copy")
        stored = json.loads((run / "results.json").read_text())
        beside = run / "other_protocols" / "text-window-8-0"
        beside.mkdir(parents=True)
        for folder in (run, beside):
            (folder / "results.json").write_text(json.dumps({**stored, "checkpoint": "another"}))
        arguments = ["--config", str(run / "config.yaml"), f"--trainer.default_root_dir={run}"]
        assert main(["validate", *arguments, "--model.eval_bits=[3]"]) == 0
        assert "was of another checkpoint" in capsys.readouterr().err
        rows = json.loads((run / "results.json").read_text())["rows"]
        assert {row["target_bits"] for row in rows if row["allocation"] == "router"} == {3}
        assert [b.target_bits for b in read_diagnostics(run / "diagnostics.json").budgets] == [3]
        assert not beside.exists()

    def test_validate_without_a_run_says_what_to_do_first(
        self, recipe_arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["validate", *recipe_arguments]) == 1
        assert "Run `fit` with this recipe first" in capsys.readouterr().err

    @pytest.mark.parametrize("command", ["fit", "validate"])
    def test_changed_weights_behind_the_same_recipe_are_noticed(
        self, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
    ) -> None:
        run = shutil.copytree(finished[0], tmp_path / "copy")
        if command == "fit":
            (run / "results.json").unlink()
        identity = json.loads((run / "identity.json").read_text())
        (run / "identity.json").write_text(json.dumps({**identity, "source weights": "0000"}))
        arguments = ["--config", str(run / "config.yaml"), f"--trainer.default_root_dir={run}"]
        assert main([command, *arguments]) == 1
        assert "source weights: 0000 then" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--model.slices.init_args.slice_bits=[4,2,2]"],
            "[2, 2.5] lie outside of what the slices give, 4 to 8",
        ),
        (["--model.budget.init_args.high_bits=9"], "high_bits (9): the slices [2, 1, 1, 2, 2] give 2 to 8 bits"),
        (["--model.eval_bits=[1, 4]"], "[1] lie outside"),
        (
            ["--model.layout={shared_inputs: [[q_proj, a]]}"],
            "model.layout.shared_inputs: no block has a; its linears are",
        ),
        (["--model.epochs_per_block=0"], "at least 1"),
        (["--model.stages=[{share: 0.5, train: [ranges, transforms]}]"], "must be above 0 and add up to 1"),
        (["--model.slices.init_args.group_size=0"], "group_size: 0 is out of range"),
        (["--model.rates.ranges=fast"], "model.rates.ranges"),
        (["--trainer.max_epoch=3"], "Did you mean 'trainer.max_epochs'"),
        (["--model.router.init_args.hiden=3"], "hiden"),
        (["--trainer.strategy=fsdp", "--trainer.devices=1"], "fsdp"),
    ],
)
def test_recipes_that_cannot_work_are_refused_before_the_model_is_loaded(
    recipe_arguments: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *recipe_arguments, *change]) != 0
    error = capsys.readouterr().err
    assert message.lower() in error.lower()
    assert "Loading weights" not in error


@pytest.mark.parametrize(
    ("router", "bits"), [("MLPRouter", "[2,2,4]"), ("StaticRouter", "[2,2,2,2]"), ("RandomRouter", "[2,2,4]")]
)
def test_other_slices_and_routers_run_by_a_change_of_the_recipe(
    recipe_arguments: list[str], tmp_path: Path, bits: str, router: str
) -> None:
    arguments = [*recipe_arguments, f"--model.slices.init_args.slice_bits={bits}", f"--model.router={router}"]
    stages = "--model.stages=[{share: 1, train: [ranges, transforms, routers]}]"
    assert main(["fit", *arguments, "--model.epochs_per_block=1", stages]) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    router_row: dict[str, Any] = next(r for r in rows if r["allocation"] == "router" and r["target_bits"] == 2.5)
    # Thresholds come from 256 tokens here; a router whose thresholds were lost would read whole slices too many.
    assert router_row["used_bits"] == pytest.approx(2.5, abs=0.4)


@pytest.mark.parametrize(
    "model",
    [
        {"tied": False, "dtype": torch.bfloat16, "sharded": True},
        {"kind": "qwen2"},
        {"attention_bias": True, "mlp_bias": True, "dtype": torch.float16},
    ],
    ids=str,
)
def test_models_of_the_family_calibrate_save_and_load(
    recipe_arguments: list[str], make_model: Callable[..., Path], tmp_path: Path, model: dict[str, Any]
) -> None:
    arguments = [*recipe_arguments, f"--model.pretrained={make_model(**model)}", "--model.share_routers=linear"]
    assert main(["fit", *arguments, "--model.eval_bits=[2, 8]", "--model.hidden_states=disk"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    kl = {(r["allocation"], r["target_bits"]): r["kl"] for r in results["rows"]}
    assert kl["router", 8.0] < 0.1 * kl["router", 2.0]
    loaded = load(tmp_path / "run")
    assert loaded.dtype == model.get("dtype", torch.float32)
    attention = loaded.model.layers[0].self_attn
    assert {value.dtype for value in attention.q_proj.input.state_dict().values()} == {torch.float32}
    assert attention.q_proj.slice_scale.dtype == torch.bfloat16
    saved = tensors_of(tmp_path / "run" / "elastic")
    assert all(torch.equal(saved[name], value) for name, value in loaded.state_dict().items() if name in saved)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert not list((tmp_path / "run").rglob("hidden_states/*/*"))
