"""Damaged checkpoints are refused, named by `verify` and not exported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import mobiq_lightning
from mobiq_lightning.checkpoint import export, verify
from mobiq_lightning.cli import main
from mobiq_lightning.errors import CheckpointError
from mobiq_lightning.runs import INDEX
from tests.checkpoints import PLANE, Q, edit_json, edit_tensors, logits, rehash, tensors_of
from tests.conftest import Run


class TestDamage:
    """Everything is refused by both ways in, and named by `verify`, which compares bytes before shapes."""

    def refused(self, folder: Path, message: str, by_verify: str | None = None) -> None:
        for load in (mobiq_lightning.load, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(CheckpointError, match=message):
                load(folder)
        problems = verify(folder)
        assert any(re.search(by_verify or message, problem) for problem in problems), problems

    def test_a_truncated_shard(self, broken: Path) -> None:
        path = sorted(broken.glob("*.safetensors"))[1]
        path.write_bytes(path.read_bytes()[:-100])
        self.refused(broken, rf"{path.name} is cut off or damaged: it should be \d+ bytes long and has \d+")

    def test_a_shard_without_a_header(self, broken: Path) -> None:
        path = sorted(broken.glob("*.safetensors"))[0]
        path.write_bytes(path.read_bytes()[:5])
        self.refused(broken, f"{path.name} is cut off or damaged")

    def test_a_flipped_byte(self, broken: Path, model: Any) -> None:
        def flip(tensors: dict[str, torch.Tensor]) -> None:
            tensors[PLANE].view(-1)[7] ^= 4

        name = edit_tensors(broken, flip)
        self.refused(broken, f"{name}: the bytes of {PLANE} are not those that were written", PLANE)
        unchecked = mobiq_lightning.load(broken, check_hashes=False)
        assert torch.equal(logits(unchecked, 3), logits(model, 3)), "the fourth plane is not read at 3 bits"
        assert not torch.equal(logits(unchecked, 4), logits(model, 4)), "damage that nobody looks for is computed with"

    def test_a_flipped_byte_in_a_plane_that_is_not_read_does_not_matter(self, broken: Path, model: Any) -> None:
        def flip(tensors: dict[str, torch.Tensor]) -> None:
            tensors["model.layers.0.mlp.down_proj.plane_7"].view(-1)[0] ^= 1

        edit_tensors(broken, flip)
        small = mobiq_lightning.load(broken, max_bits=6)
        for bits in (2, 4, 6):
            assert torch.equal(logits(small, bits), logits(model, bits))
        with pytest.raises(CheckpointError, match="plane_7"):
            mobiq_lightning.load(broken)

    def test_a_wrong_shape(self, broken: Path) -> None:
        name = edit_tensors(broken, lambda t: t.update({PLANE: t[PLANE][:-1].clone()}))
        self.refused(broken, rf"{name}: {PLANE} has shape \[31, 6\], should have \[32, 6\]", f"the bytes of {PLANE}")

    def test_a_wrong_dtype(self, broken: Path) -> None:
        name = edit_tensors(broken, lambda t: t.update({PLANE: t[PLANE].float()}))
        self.refused(broken, f"{name}: {PLANE} has dtype F32", f"the bytes of {PLANE}")

    def test_a_missing_plane(self, broken: Path) -> None:
        edit_tensors(broken, lambda t: t.pop(PLANE))
        self.refused(broken, f"{PLANE} is missing")

    def test_a_missing_router(self, broken: Path) -> None:
        edit_tensors(broken, lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{Q}.input.router.")], -1)
        self.refused(broken, f"the router of {Q} is missing")

    def test_missing_thresholds(self, broken: Path) -> None:
        edit_tensors(broken, lambda t: t.pop(f"{Q}.input.layer_thresholds"), -1)
        self.refused(broken, f"the thresholds of {Q} are missing")

    def test_a_missing_norm(self, broken: Path) -> None:
        edit_tensors(broken, lambda t: t.pop("model.layers.0.input_layernorm.weight"))
        self.refused(broken, r"model\.layers\.0\.input_layernorm\.weight is missing")

    def test_a_tensor_of_another_model(self, broken: Path) -> None:
        edit_tensors(broken, lambda t: t.update({"model.layers.0.extra": torch.zeros(2)}))
        self.refused(broken, r"model\.layers\.0\.extra is not in the index")
        rehash(broken)
        self.refused(broken, r"model\.layers\.0\.extra is not part of this model")

    def test_a_missing_shard(self, broken: Path) -> None:
        sorted(broken.glob("*.safetensors"))[0].unlink()
        with pytest.raises(CheckpointError, match="model-00001-of-00003"):
            mobiq_lightning.load(broken)
        assert "model-00001-of-00003.safetensors is missing" in verify(broken)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format_version": 99}, "format version 99.*up to 3"),
            ({"code": "morse"}, "there is no code 'morse'; there are nested, per_slice, per_plane, codebook"),
            ({"slice_bits": None}, "quantization_config lacks slice_bits"),
            ({"group_sise": 16}, "unknown key 'group_sise'. Did you mean 'group_size'"),
            (
                {"router": {"class_path": "mobiq_lightning.strategies.NoTransform"}},
                r"no mobiq_lightning.strategies.Router",
            ),
            (
                {"router": {"class_path": "mobiq_lightning.strategies.MLPRouter", "init_args": {"x": 1}}},
                "cannot be built",
            ),
        ],
    )
    def test_a_config_that_does_not_fit(self, broken: Path, change: dict[str, Any], message: str) -> None:
        def edit(config: dict[str, Any]) -> None:
            stored = config["quantization_config"] | change
            config["quantization_config"] = {k: v for k, v in stored.items() if v is not None}

        edit_json(broken, "config.json", edit)
        rehash(broken)
        self.refused(broken, message)

    def test_a_model_that_is_not_elastic(self, make_model: Callable[..., Path]) -> None:
        with pytest.raises(CheckpointError, match="holds no elastic model"):
            mobiq_lightning.load(make_model())

    @pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "runs/a/b"])
    def test_no_checkpoint_at_all(self, name: str) -> None:
        with pytest.raises(CheckpointError, match="holds no elastic checkpoint"):
            mobiq_lightning.load(name)

    def test_a_hub_id_that_cannot_be_reached(self) -> None:
        with pytest.raises(CheckpointError, match=r"neither a folder .* nor reachable on the hub"):
            mobiq_lightning.load("nobody/nothing-elastic")


class TestVerify:
    def test_a_whole_checkpoint_passes(self, finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", str(finished[0])]) == 0
        assert "DAMAGED" not in capsys.readouterr().out

    def test_damage_is_named_and_the_command_fails(self, broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (broken / "tokenizer.json").write_text("{}")
        assert main(["verify", str(broken)]) == 1
        output = capsys.readouterr()
        assert "DAMAGED  files and hashes" in output.out
        assert "tokenizer.json is not what was written" in output.out
        assert "1 problem" in output.err

    def test_hashes_that_cannot_be_read_are_named(self, broken: Path) -> None:
        (broken / "hashes.json").write_text("{")
        assert any("hashes.json cannot be read" in problem for problem in verify(broken))
        with pytest.raises(CheckpointError, match=r"hashes\.json cannot be read: .* not valid JSON"):
            mobiq_lightning.load(broken)

    @pytest.mark.parametrize(
        ("tensor", "shard", "change", "message"),
        [
            (f"{Q}.input.layer_thresholds", -1, lambda v: v[-1].flip(0), "thresholds must not rise with the budget"),
            (f"{Q}.slice_scale", 0, lambda v: v * 0, "scales are not above 0"),
            (f"{Q}.slice_bias", 0, lambda v: v / 0, "values are NaN or infinite"),
            (PLANE, 0, lambda v: v | 1, "bits beyond the last of 44 weights are set"),
        ],
    )
    def test_values_that_cannot_be_are_named(
        self, broken: Path, tensor: str, shard: int, change: Callable[[torch.Tensor], torch.Tensor], message: str
    ) -> None:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            value = change(tensors[tensor])
            tensors[tensor] = value.expand_as(tensors[tensor]).contiguous()

        edit_tensors(broken, edit, shard)
        rehash(broken)
        problems = verify(broken)
        assert any(message in problem and tensor.rpartition(".")[0] in problem for problem in problems), problems


class TestExport:
    def test_a_part_holds_the_first_planes_and_runs_alike(self, finished: Run, model: Any, tmp_path: Path) -> None:
        assert main(["export", str(finished[0]), "--to", str(tmp_path / "four"), "--max-bits", "4"]) == 0
        assert verify(tmp_path / "four") == []
        planes = {name.rpartition(".")[2] for name in tensors_of(tmp_path / "four") if ".plane_" in name}
        assert planes == {f"plane_{p}" for p in range(4)}
        small, capped = mobiq_lightning.load(tmp_path / "four"), mobiq_lightning.load(finished[0], max_bits=4)
        for bits in (2, 2.6, 3.7, 4):
            assert torch.equal(logits(small, bits), logits(capped, bits))
        assert "Measured with all planes" in (tmp_path / "four" / "README.md").read_text()
        assert (tmp_path / "four" / "tokenizer.json").is_file()

    def test_a_whole_copy_has_the_same_tensors(self, finished: Run, tmp_path: Path) -> None:
        export(finished[0], tmp_path / "copy")
        for path in (finished[0] / "elastic").glob("*.safetensors"):
            assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
        for name in ("config.json", INDEX):
            assert json.loads((tmp_path / "copy" / name).read_text()) == json.loads(
                (finished[0] / "elastic" / name).read_text()
            )
        assert verify(tmp_path / "copy") == []

    def test_damage_is_not_copied(self, broken: Path, tmp_path: Path) -> None:
        edit_tensors(broken, lambda t: t.update({PLANE: t[PLANE] ^ 2}))
        with pytest.raises(CheckpointError, match=f"nothing was exported.\n.*{PLANE}"):
            export(broken, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--max-bits", "5"], "no prefix of the slices; give one of"),
            ([], "exists; give another folder, or --overwrite"),
            (["--to", ""], "--to: '' is no name that a folder can have"),
        ],
    )
    def test_what_cannot_be_exported_is_answered(
        self, finished: Run, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / ("new" if arguments else "")
        assert main(["export", str(finished[0]), "--to", str(target), *arguments]) != 0
        assert message in capsys.readouterr().err

    def test_it_never_replaces_its_own_source(self, finished: Run) -> None:
        with pytest.raises(CheckpointError, match="is the checkpoint itself"):
            export(finished[0], finished[0] / "elastic", overwrite=True)
