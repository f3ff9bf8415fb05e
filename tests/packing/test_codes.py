"""Checkpoints in other codes than the nested one: calibrated, saved, loaded and cut through the command line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mobiq_lightning
from mobiq_lightning.calibration import SafeCheckpointIO
from mobiq_lightning.checkpoint import CheckpointWriter, verify
from mobiq_lightning.checkpoint.write import block_tensors
from mobiq_lightning.cli import main
from mobiq_lightning.errors import CheckpointError, KernelError
from mobiq_lightning.kernels import relay
from mobiq_lightning.latency.command import chosen_shapes
from mobiq_lightning.nn import ElasticLinear, RoutedInput, SlicedLinear, fixed_depth, routed_inputs
from mobiq_lightning.packing import CODES, WHOLE_ROW, pack_planes, plane_of
from mobiq_lightning.strategies import KMeansSlices, StaticRouter
from tests.checkpoints import DEPTHS, IDS, edit_tensors, logits, rehash, tensors_of
from tests.conftest import UNTIMED, small_recipe

SCHEMES = {"IndependentResidualSlices": 16, "BinaryCodedSlices": 16, "KMeansSlices": WHOLE_ROW}
"""Group size by scheme."""
Calibrated = tuple[Path, dict[int, torch.Tensor], list[str]]


@pytest.fixture(scope="module", params=SCHEMES)
def calibrated(
    request: pytest.FixtureRequest,
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Calibrated:
    """A finished run of a scheme, the logits of its calibrated model at every depth, taken as it was saved, and the
    command line."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = {
        "--model.slices": request.param,
        "--model.slices.init_args.slice_bits": "[2,1,1,2,2]",
        "--model.slices.init_args.group_size": str(SCHEMES[request.param]),
        "--model.eval_bits": "[2.5, 8]",
        "--data.eval_max_windows": "2",
        # These codes hardly learn in two epochs: a guard that puts rounding in the place of a block would leave nothing to see.
        "--trainer.callbacks": "[{class_path: mobiq_lightning.callbacks.Guards, init_args: {worse_block: record}}, "
        f"{UNTIMED}]",
    }
    arguments = small_recipe(make_model(), text_file, folder) + [f"{key}={value}" for key, value in settings.items()]
    found: dict[int, torch.Tensor] = {}
    finish = CheckpointWriter.finish

    def read_and_finish(self: CheckpointWriter, *rest: Any) -> Any:
        inputs = routed_inputs(self.source.model)
        for depth in DEPTHS:
            with torch.no_grad(), fixed_depth(inputs, depth):
                found[depth] = self.source.model(IDS).logits
        return finish(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "finish", read_and_finish)
        assert main(["fit", *arguments]) == 0
    return folder / "run", found, arguments


def test_the_loaded_model_is_the_calibrated_one_at_every_depth(calibrated: Calibrated) -> None:
    model = mobiq_lightning.load(calibrated[0])
    for depth, wanted in calibrated[1].items():
        with torch.no_grad(), fixed_depth(model.dial.inputs, depth):
            assert torch.equal(model(IDS).logits, wanted)
        torch.testing.assert_close(logits(model, depth), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(model, 2), logits(model, 8), atol=1e-2), "the test needs depths that differ"
    model.set_bits(3.3)
    model(IDS)
    assert 2 < model.bits_used().code_bits < 8


def test_a_checkpoint_says_its_code_and_what_it_spends(
    calibrated: Calibrated, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = calibrated[0] / "elastic"
    elastic = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert elastic["format_version"] == 3, "packages that know the nested code alone must refuse it"
    linears = [m for m in mobiq_lightning.load(folder).modules() if isinstance(m, ElasticLinear)]
    assert {linear.code for linear in linears} == {elastic["code"]}
    values = [v for name, v in tensors_of(folder).items() if ".slice_" in name]
    assert {value.dtype for value in values} == {torch.bfloat16}
    n_weights = sum(linear.n_weights for linear in linears)
    spent = 16 * sum(value.numel() for value in values) / n_weights
    results = json.loads((folder / "results.json").read_text())
    assert results["slices"]["overhead_bits"] == pytest.approx(spent)
    by_name = {row["allocation"]: row for row in results["rows"]}
    assert by_name["static"]["all_in_bits"] == pytest.approx(by_name["static"]["used_bits"] + spent)
    size = min(elastic["group_size"], 32)
    nested = sum(32 * m.out_features * -(-m.in_features // min(size, m.in_features)) for m in linears) / n_weights
    if elastic["group_size"] < WHOLE_ROW:  # round-to-nearest stays nested, and pays for that
        assert by_name["rtn"]["all_in_bits"] == pytest.approx(by_name["rtn"]["used_bits"] + nested)
    assert f"{elastic['code']} code, which runs on the reference alone" in (folder / "README.md").read_text()
    assert main(["inspect", str(folder)]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert f"{elastic['code']}; the reference reads it, the kernels do not" in output
    assert (
        f"{8 * sum(v.nbytes for n, v in tensors_of(folder).items() if '.plane_' in n) / n_weights + spent:.3f} with"
        in output
    )


def test_learning_moved_the_values(calibrated: Calibrated) -> None:
    newest = SafeCheckpointIO().load_checkpoint(max((calibrated[0] / "checkpoints").glob("epoch-*.ckpt")))["state_dict"]
    # Tables of 3 and 6 bits learn only if tokens happen to be routed to those depths.
    spared = (".shifts.1", ".shifts.3")
    learned = {name: value for name, value in newest.items() if ".schemes." in name and not name.endswith(spared)}
    assert learned
    assert all(bool((value != 0).any()) for value in learned.values())


def test_a_part_holds_the_values_of_its_depths_and_runs_alike(calibrated: Calibrated, tmp_path: Path) -> None:
    assert verify(calibrated[0]) == []
    assert main(["export", str(calibrated[0]), "--to", str(tmp_path / "four"), "--max-bits", "4"]) == 0
    assert verify(tmp_path / "four") == []
    assert {plane_of(name) for name in tensors_of(tmp_path / "four")} == {None, 0, 1, 2, 3}
    whole = mobiq_lightning.load(calibrated[0])
    for small in (mobiq_lightning.load(tmp_path / "four"), mobiq_lightning.load(calibrated[0], max_bits=4)):
        for depth in (2, 3, 4):
            assert torch.equal(logits(small, depth), logits(whole, depth))
        assert small.dial.highest == 4
    small.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(mobiq_lightning.load(tmp_path / "again"), 3.3), logits(small, 3.3))


def test_values_that_cannot_be_are_named(calibrated: Calibrated, tmp_path: Path) -> None:
    broken = tmp_path / "elastic"
    shutil.copytree(calibrated[0] / "elastic", broken)
    name = next(n for n in tensors_of(broken) if ".slice_" in n)
    edit_tensors(broken, lambda t: t.update({name: t[name] / 0}))
    with pytest.raises(CheckpointError, match=re.escape(f"the bytes of {name}")):
        mobiq_lightning.load(broken)
    rehash(broken)
    assert any(f"{name}: " in problem and "NaN or infinite" in problem for problem in verify(broken))


def test_the_kernels_are_refused_by_name_and_the_reference_says_why_it_runs(
    calibrated: Calibrated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = mobiq_lightning.load(calibrated[0])
    linear = next(m for m in model.modules() if isinstance(m, ElasticLinear))
    why = f"the weights are in the {linear.code} code"
    assert model.path.startswith(f"reference: {why}")
    with pytest.raises(KernelError, match=why):
        model.switch_kernels()
    with pytest.raises(ValueError, match=f"not {linear.code}"):
        relay([linear.packed])
    to = ["--to", str(tmp_path), "--sections", "decode", "--minutes", "1e-6"]
    assert main(["latency", str(calibrated[0]), *to]) == 0
    output = capsys.readouterr()
    assert why in output.out + output.err
    with pytest.raises(KernelError, match="CUDA_VISIBLE_DEVICES= times the reference"):
        chosen_shapes(str(calibrated[0]), "", "kernels")


@pytest.mark.parametrize("calibrated", ["KMeansSlices"], indirect=True)
def test_it_compiles_whole(calibrated: Calibrated) -> None:
    torch._dynamo.reset()
    model = mobiq_lightning.load(calibrated[0])
    compiled = torch.compile(model.model.layers[0].mlp.up_proj, fullgraph=True, backend="aot_eager")
    model.set_bits(3.3)
    x = torch.randn(40, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model.model.layers[0].mlp.up_proj(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("calibrated", ["KMeansSlices"], indirect=True)
def test_a_resumed_run_ends_bit_by_bit_as_if_it_had_not_stopped(calibrated: Calibrated, tmp_path: Path) -> None:
    run = shutil.copytree(calibrated[0], tmp_path / "run")
    shutil.rmtree(run / "elastic")
    (run / "results.json").unlink()
    for late in (run / "checkpoints").glob("*000003*"):  # the last epoch of the second block is left
        late.unlink()
    kept = [a for a in calibrated[2] if not a.startswith("--trainer.default_root_dir")]
    assert main(["fit", *kept, f"--trainer.default_root_dir={run}"]) == 0
    before, after = tensors_of(calibrated[0] / "elastic"), tensors_of(run / "elastic")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("code", CODES)
def test_only_depths_of_slices_are_read(code: str) -> None:
    kind, bits = CODES[code], (2, 1, 2)
    codes = torch.randint(0, 32, (3, 20), dtype=torch.uint8)
    shapes = kind.value_shapes(3, 20, 8, bits)
    values = tuple(torch.rand(s).bfloat16() for s in shapes.values())
    packed = kind(tuple(pack_planes(codes, 5)), values, 20, 8, bits)
    assert packed.weight_at(3).shape == (3, 20)
    for wrong in (0, 6) if code == "nested" else (0, 4, 6):
        with pytest.raises(ValueError, match=rf"n_bits \({wrong}\)"):
            packed.weight_at(wrong)


def test_tables_planes_and_slices_are_read_as_their_formulas_say() -> None:
    codes = torch.tensor([[0b101, 0b010]], dtype=torch.uint8)  # 2 and 1 bits; groups of one column

    def weight(code: str, n_bits: int, *values: list[float]) -> list[float]:
        shapes = CODES[code].value_shapes(1, 2, 1, (2, 1)).values()
        stored = tuple(torch.tensor(v).reshape(s).bfloat16() for v, s in zip(values, shapes, strict=True))
        packed = CODES[code](tuple(pack_planes(codes, 3)), stored, 2, 1, (2, 1))
        return packed.weight_at(n_bits).flatten().tolist()

    ranges = ([4.0, 8.0], [1.0, 0.0], [2.0, 2.0], [0.0, 0.5])  # scale and bias of the base, then of the residual
    assert weight("per_slice", 2, *ranges) == [1.5, -1.0]
    assert weight("per_slice", 3, *ranges) == [1.5 + 0.5, -1.0 + 0.5 - 0.5]
    planes = ([1.0, 0.0], [4.0, 4.0], [2.0, 2.0], [1.0, 0.5])  # bias, then scales
    assert weight("per_plane", 2, *planes) == [1 + 4 - 2, -4 + 2]
    assert weight("per_plane", 3, *planes) == [1 + 4 - 2 + 1, -4 + 2 - 0.5]
    tables = ([float(i) for i in range(8)], [float(i) for i in range(10, 26)])
    assert weight("codebook", 2, *tables) == [2.0, 5.0]
    assert weight("codebook", 3, *tables) == [15.0, 20.0]


class MislabelledSlices(KMeansSlices):
    """Says that it packs the nested code."""

    code = "nested"


def test_a_scheme_that_packs_another_code_than_it_says_is_refused() -> None:
    linear = torch.nn.Linear(8, 4)
    routed = RoutedInput(StaticRouter(8, 3), (2, 1, 1), 32)
    block = torch.nn.ModuleDict({"up": SlicedLinear(linear, MislabelledSlices(4, 8), routed)})
    with pytest.raises(CheckpointError, match=r"0\.up: MislabelledSlices packs the codebook code.*PackedTables\.code"):
        block_tensors("0", block)
