"""Runs with a transform: what they write, how they go on, and what loads them."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from mobiq_lightning import load
from mobiq_lightning.calibration import SafeCheckpointIO
from mobiq_lightning.checkpoint import verify
from mobiq_lightning.checkpoint.format import needed_version
from mobiq_lightning.cli import main
from mobiq_lightning.errors import CheckpointError
from mobiq_lightning.nn import BlockLayout, CalibratedBlock, ElasticLinear, fixed_depth, routed_inputs
from mobiq_lightning.runtime import Dial
from mobiq_lightning.sources import load_source
from mobiq_lightning.strategies import (
    LearnableEquivalentTransform,
    MLPRouter,
    ResidualSlices,
    Transform,
)
from tests.checkpoints import Q, edit_tensors, generate, logits, logits_of, rehash, tensors_of
from tests.conftest import Run, small_recipe

FEW = ["--model.eval_bits=[2, 8]", "--data.eval_max_windows=4"]


@pytest.fixture(scope="module")
def equivalent(make_model: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with LET, on a model that has biases already. Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("equivalent")
    arguments = [*small_recipe(make_model(kind="qwen2"), text_file, folder), *FEW, "--model.rates.transforms=0.02"]
    arguments += ["--model.transform=LearnableEquivalentTransform"]
    assert main(["fit", *arguments]) == 0
    return folder / "run", arguments


@pytest.fixture(scope="module")
def rotated(make_model: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with a rotation, on a model with tied embeddings. Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("rotated")
    arguments = [*small_recipe(make_model(), text_file, folder), "--model.eval_bits=[2, 8]", "--model.random_seeds=[0]"]
    assert main(["fit", *arguments, "--model.transform=HadamardRotation", "--model.transform.init_args.seed=5"]) == 0
    return folder / "run", arguments


def test_a_checkpoint_is_whole_and_says_how_it_was_transformed(
    equivalent: Run, rotated: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"HadamardRotation": {"seed": 5}, "LearnableEquivalentTransform": {"shift": True, "alpha": 0.5}}
    shown = {"HadamardRotation": "kept per input: nothing", "LearnableEquivalentTransform": "alpha=0.5"}
    for name, (run, _) in zip(arguments, (rotated, equivalent), strict=True):
        assert verify(run) == []
        elastic = run / "elastic"
        config = json.loads((elastic / "config.json").read_text())["quantization_config"]["transform"]
        origin = json.loads((elastic / "provenance.json").read_text())["transform"]
        for said in (config, origin):
            assert said["class_path"] == f"mobiq_lightning.strategies.{name}"
            assert said["init_args"] == arguments[name]
        capsys.readouterr()
        assert main(["inspect", str(run)]) == 0
        printed = capsys.readouterr().out
        assert name in printed
        assert shown[name] in printed
        assert main(["export", str(run), "--to", str(tmp_path / name), "--max_bits", "4"]) == 0
        assert verify(tmp_path / name) == []
        whole, part = load(run), load(tmp_path / name)
        assert torch.equal(logits(whole, 4.0), logits(part, 4.0))
        assert generate(part, bits=2.5).shape == (2, 18)


def test_the_reference_rows_are_of_the_model_as_it_was_given(finished: Run, rotated: Run) -> None:
    rows = [json.loads((run / "results.json").read_text())["rows"] for run, _ in (finished, rotated)]
    plain, other = ([r for r in of_run if r["allocation"] in ("full", "rtn")] for of_run in rows)
    assert len(plain) == 6
    assert plain == other
    at_eight = next(r for r in rows[1] if r["allocation"] == "router" and r["target_bits"] == 8)
    assert at_eight["kl"] < 0.05, "what was calibrated is the model that it is compared with"


def test_tied_embeddings_are_saved_apart_and_nothing_else_is_added(finished: Run, rotated: Run) -> None:
    plain, other = (tensors_of(run / "elastic") for run, _ in (finished, rotated))
    assert set(other) - set(plain) == {"lm_head.weight"}
    assert json.loads((finished[0] / "elastic" / "config.json").read_text())["tie_word_embeddings"] is True
    assert json.loads((rotated[0] / "elastic" / "config.json").read_text())["tie_word_embeddings"] is False
    model = load(rotated[0])
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, other["lm_head.weight"])


def test_transformed_inputs_are_stored_in_float32_beside_their_routers_in_bfloat16(equivalent: Run) -> None:
    tensors = tensors_of(equivalent[0] / "elastic")
    of_transforms = {name: value for name, value in tensors.items() if ".input.transform." in name}
    assert len(of_transforms) == 2 * 4 * 2
    assert {value.dtype for value in of_transforms.values()} == {torch.float32}
    assert {name.rpartition(".")[2] for name in of_transforms} == {"scale", "shift"}
    linears = {name.removesuffix(".plane_0") for name in tensors if name.endswith(".plane_0")}
    assert all(f"{name}.bias" in tensors for name in linears)
    model = load(equivalent[0], dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.down_proj.input.transform.scale.dtype == torch.float32
    assert bool(torch.isfinite(logits(model, 3.0)).all())
    row = next(
        r for r in json.loads((equivalent[0] / "results.json").read_text())["rows"] if r["allocation"] == "router"
    )
    linear_bits = sum(32 * 2 * n for n in (32, 32, 32, 44)) + 32 * (32 + 16 + 16 + 32 + 44 + 44 + 32)
    n_weights = 32 * (32 + 16 + 16 + 32 + 44 + 44 + 44)
    scales = sum(32 * -(-i // 16) * o for o, i in [(32, 32)] * 2 + [(16, 32)] * 2 + [(44, 32)] * 2 + [(32, 44)])
    routers = row["all_in_bits"] - row["used_bits"] - (linear_bits + scales) / n_weights
    assert routers == pytest.approx(16 * (3 * (33 * 4 + 4) + 45 * 4 + 4 + 4 * (4 * 4 + 4)) / n_weights, abs=1e-6)


def test_the_loaded_model_is_the_calibrated_one_bit_by_bit(equivalent: Run) -> None:
    run, _ = equivalent
    config = yaml.safe_load((run / "config.yaml").read_text())["model"]
    source = load_source(config["pretrained"])
    state = SafeCheckpointIO().load_checkpoint(max((run / "checkpoints").glob("epoch-*.ckpt")))["state_dict"]
    scheme = functools.partial(ResidualSlices, **config["slices"]["init_args"])
    router = functools.partial(MLPRouter, **config["router"]["init_args"])
    for index, block in enumerate(source.model.model.layers):
        groups = BlockLayout().group_linears(block, "input")
        learned = CalibratedBlock(block, groups, scheme, router, LearnableEquivalentTransform())
        prefix = f"blocks.{index}."
        learned.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    elastic = load(run)
    dial = Dial(routed_inputs(source.model))
    for bits in (2.0, 2.75, 3.5, 6.0, 8.0):
        dial.set_bits(bits)
        assert torch.equal(logits_of(source.model), logits(elastic, bits))
    for depth in (2, 4, 8):
        with fixed_depth(routed_inputs(source.model), depth), fixed_depth(routed_inputs(elastic), depth):
            assert torch.equal(logits_of(source.model), logits_of(elastic))


@pytest.mark.parametrize("newest", [2, 1], ids=["within a block", "between blocks"])
def test_a_resumed_run_takes_its_transforms_from_its_checkpoint(equivalent: Run, tmp_path: Path, newest: int) -> None:
    run, arguments = equivalent
    copy = shutil.copytree(run, tmp_path / "run")
    for path in (copy / "checkpoints").glob("*.ckpt"):
        if int(path.stem.rpartition("-")[2]) > newest:
            path.unlink()
            path.with_suffix(".sha256").unlink()
    shutil.rmtree(copy / "elastic")
    (copy / "results.json").unlink()
    arguments = [a for a in arguments if "default_root_dir" not in a]
    assert main(["fit", *arguments, f"--trainer.default_root_dir={copy}"]) == 0
    before, after = tensors_of(run / "elastic"), tensors_of(copy / "elastic")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_scales_are_learned(equivalent: Run) -> None:
    states = [
        SafeCheckpointIO().load_checkpoint(equivalent[0] / "checkpoints" / f"epoch-{epoch:06d}.ckpt")["state_dict"]
        for epoch in (2, 3)
    ]
    learned = [name for name in states[0] if name.startswith("blocks.1.") and ".transform." in name]
    assert len(learned) == 8
    assert all(not torch.equal(states[0][name], states[1][name]) for name in learned)


def test_kernels_multiply_what_is_transformed_in_front_of_them(equivalent: Run) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter's figures are compared")
    ours, theirs = load(equivalent[0], bits=3.2), load(equivalent[0], bits=3.2)
    ours.switch_kernels()
    theirs.switch_kernels(False)
    assert ours.path == "kernels"
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    attentions = [model.model.layers[0].self_attn for model in (ours, theirs)]
    with torch.no_grad():
        for name in ("q_proj", "v_proj"):
            torch.testing.assert_close(*(getattr(a, name)(x) for a in attentions), atol=2e-4, rtol=1e-3)
    kernels = {id(m.kernel): m.kernel for m in ours.modules() if isinstance(m, ElasticLinear)}.values()
    assert all(kernel is not None and not kernel.routes(x[:, :1]) for kernel in kernels), "no norm or MLP enters them"


def test_what_is_left_of_a_transform_is_checked_when_it_is_loaded(equivalent: Run, tmp_path: Path) -> None:
    elastic = shutil.copytree(equivalent[0] / "elastic", tmp_path / "elastic")
    config = json.loads((elastic / "config.json").read_text())
    config["quantization_config"]["transform"]["stored"] = ["scale", "rotation"]
    (elastic / "config.json").write_text(json.dumps(config))
    rehash(elastic)
    with pytest.raises(CheckpointError, match=r"transform.stored.*rotation.*newer than this version"):
        load(elastic)
    config["quantization_config"]["transform"] = None
    (elastic / "config.json").write_text(json.dumps(config))
    rehash(elastic)
    with pytest.raises(CheckpointError, match=r"down_proj\.bias is not part of this model"):
        load(elastic)


def test_a_scale_that_is_not_above_zero_is_found(equivalent: Run, tmp_path: Path) -> None:
    elastic = shutil.copytree(equivalent[0] / "elastic", tmp_path / "elastic")
    name = f"{Q}.input.transform.scale"
    edit_tensors(elastic, lambda tensors: tensors[name].mul_(-1), shard=-1)
    rehash(elastic)
    assert f"{name}: 32 of 32 scales are not above 0" in verify(elastic)[0]


class Forgetful(Transform):
    """Does not keep what it was given."""

    def __init__(self, strength: float = 1.0) -> None:
        pass


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("--model.transform=HadamardRotaton", "Did you mean 'HadamardRotation'"),
        ("--model.transform={class_path: HadamardRotation, init_args: {sed: 1}}", "Did you mean 'seed'"),
        ("--model.transform={class_path: LearnableEquivalentTransform, init_args: {alpha: 2}}", "must lie in [0, 1]"),
        (f"--model.transform={__name__}.Forgetful", "Forgetful must keep the arguments of its __init__"),
    ],
)
def test_what_a_recipe_says_wrong_is_answered(
    recipe_arguments: list[str], given: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *recipe_arguments, given]) == 2
    assert answer in capsys.readouterr().err


def test_the_errors_of_blocks_are_those_of_the_sources_own_stream(rotated: Run, equivalent: Run) -> None:
    for run, _ in (rotated, equivalent):
        found = json.loads((run / "diagnostics.json").read_text())
        for errors in found["block_error"]["relative_error"]:
            assert errors == sorted(errors, reverse=True)
            assert errors[-1] < 1e-3, "at 8 bits a block is nearly that of the source"


def test_the_errors_of_a_transformed_input_are_those_of_its_products(equivalent: Run) -> None:
    from mobiq_lightning.outliers import InputErrors

    recipe = yaml.safe_load((equivalent[0] / "config.yaml").read_text())
    full, elastic = load_source(recipe["model"]["pretrained"]).model, load(equivalent[0])
    watched = InputErrors(full, elastic, (2, 8))
    with torch.no_grad(), watched.watch(torch.ones(2, 8, dtype=torch.bool)):
        full(input_ids=torch.arange(18).reshape(2, 9))
    name = "model.layers.1.mlp.down_proj"
    seen: list[torch.Tensor] = []
    source, stored = full.get_submodule(name), elastic.get_submodule(name)
    handle = source.register_forward_hook(lambda module, args, out: seen.append(args[0][:, :-1].flatten(0, 1)))
    with torch.no_grad():
        full(input_ids=torch.arange(18).reshape(2, 9))
        handle.remove()
        for row, bits in enumerate((2, 8)):
            with fixed_depth([stored.routed], bits):
                target = source(seen[0])
                error = (stored(seen[0]) - target).square().sum(-1) / target.square().sum(-1)
            torch.testing.assert_close(watched.errors()[name][row], error, rtol=2e-2, atol=1e-7)


def test_older_packages_are_told_that_they_cannot_read_transformed_inputs(equivalent: Run, rotated: Run) -> None:
    found = [json.loads((run / "elastic" / "config.json").read_text()) for run, _ in (equivalent, rotated)]
    stored = [config["quantization_config"]["transform"]["stored"] for config in found]
    assert [needed_version("nested", names) for names in stored] == [2, 1]
