"""The elastic checkpoint: how it loads, runs and is written."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import mobiq_lightning
from mobiq_lightning.checkpoint import CheckpointWriter, verify
from mobiq_lightning.checkpoint.check import hash_tensor
from mobiq_lightning.cli import main
from mobiq_lightning.errors import BitsError
from mobiq_lightning.nn import ElasticLinear, input_names
from mobiq_lightning.packing import n_groups
from mobiq_lightning.runs import COMPANIONS, read_results
from mobiq_lightning.runtime import cache_name
from tests.checkpoints import IDS, PLANE, edit_tensors, generate, logits, tensors_of
from tests.conftest import Run, for_others, small_recipe


class TestLoading:
    @pytest.mark.parametrize(
        "imports",
        [
            "import mobiq_lightning; from transformers import AutoModelForCausalLM",
            "from transformers import AutoModelForCausalLM; import mobiq_lightning",
            "import transformers.quantizers.auto, mobiq_lightning; from transformers import AutoModelForCausalLM",
        ],
    )
    def test_transformers_loads_it_after_the_import(self, finished: Run, imports: str) -> None:
        code = (
            f"{imports}; model = AutoModelForCausalLM.from_pretrained({str(finished[0] / 'elastic')!r});"
            "model.set_bits(3.2); assert 'ElasticLinear' in str(model), model"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

    def test_importing_the_package_imports_neither_torch_nor_transformers(self) -> None:
        code = "import sys, mobiq_lightning; assert not {'torch', 'transformers', 'lightning'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    def test_both_ways_in_give_the_same_model(self, finished: Run, model: Any) -> None:
        other = AutoModelForCausalLM.from_pretrained(finished[0] / "elastic")
        assert isinstance(other, LlamaForCausalLM)
        assert other.budget == 4.0  # where the budgets of the recipe end
        assert torch.equal(logits(other, 3.3), logits(model, 3.3))

    def test_saving_what_was_loaded_gives_the_same_bytes(self, finished: Run, model: Any, tmp_path: Path) -> None:
        model.set_bits(2.7)  # where the dial stands is no part of a checkpoint
        model.save_pretrained(tmp_path / "one")
        mobiq_lightning.load(tmp_path / "one").save_pretrained(tmp_path / "two")
        stored, one = tensors_of(finished[0] / "elastic"), tensors_of(tmp_path / "one")
        assert set(one) == set(stored)
        assert all(hash_tensor(one[name]) == hash_tensor(stored[name]) for name in stored)
        assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
            tmp_path / "two" / "model.safetensors"
        ).read_bytes()
        assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()

    def test_fewer_planes_compute_what_all_of_them_do_at_their_depths(self, finished: Run, model: Any) -> None:
        small = mobiq_lightning.load(finished[0], max_bits=4)
        assert {m.n_planes for m in small.modules() if isinstance(m, ElasticLinear)} == {4}
        for bits in (2, 3, 4):
            assert torch.equal(logits(small, bits), logits(model, bits))
        with pytest.raises(BitsError, match="holds 2 to 4"):
            small.set_bits(4.5)

    def test_fewer_planes_meet_budgets_between_their_depths(self, finished: Run) -> None:
        small = mobiq_lightning.load(finished[0], max_bits=4)
        text = Path(yaml.safe_load((finished[0] / "config.yaml").read_text())["data"]["source"]).read_text()
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(finished[0] / "elastic")(text)["input_ids"][:1024]
        for bits in (2.5, 3.5, 3.75):
            small.set_bits(bits)
            small(torch.tensor(ids).reshape(8, 128))
            assert small.bits_used().code_bits == pytest.approx(bits, abs=0.12)

    def test_a_saved_part_says_what_it_holds(self, finished: Run, tmp_path: Path) -> None:
        mobiq_lightning.load(finished[0], max_bits=3).save_pretrained(tmp_path / "three")
        with pytest.raises(BitsError, match=r"max_bits \(4\) is more than the 3 bits"):
            mobiq_lightning.load(tmp_path / "three", max_bits=4)
        assert mobiq_lightning.load(tmp_path / "three").dial.highest == 3

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_it_runs_in_half_precision(self, finished: Run, model: Any, dtype: torch.dtype) -> None:
        half = mobiq_lightning.load(finished[0], dtype=dtype)
        assert half.dtype == dtype
        for other in (half, mobiq_lightning.load(finished[0]).to(dtype)):
            difference = (logits(other, 8).float() - logits(model, 8)).abs().max() / logits(model, 8).abs().max()
            assert 0 < float(difference) < 8 * torch.finfo(dtype).eps  # a few roundings in each of two blocks

    @pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
    def test_a_device_map_is_taken(self, finished: Run, model: Any, device_map: Any) -> None:
        mapped = mobiq_lightning.load(finished[0], device_map=device_map)
        assert torch.equal(logits(mapped, 3.3), logits(model, 3.3))

    def test_copies_and_pickles_turn_their_own_dial(self, model: Any) -> None:
        model.set_bits(5)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other.set_bits(2)
            assert model.budget == 5
            assert torch.equal(logits(other, 3.3), logits(model, 3.3))
            assert other.bits_used().code_bits != 5

    def test_everything_that_belongs_to_the_tokenizer_comes_along(self) -> None:
        names = [
            "added_tokens.json",
            "tokenizer.model",
            "chat_template.jinja",
            "LICENSE.txt",
            "merges.txt",
            "vocab.json",
        ]
        assert all(any(Path(name).match(pattern) for pattern in COMPANIONS) for name in names)

    def test_eight_stored_bits_in_groups_of_128_take_at_most_8_3_bits(self) -> None:
        for columns in (4096, 11008, 14336, 4000):
            linear = ElasticLinear(columns, 64, (2, 2, 2, 2), 128, bias=False)
            size = sum(buffer.numel() * buffer.element_size() for buffer in linear.buffers())
            assert n_groups(columns, 128) == linear.get_buffer("slice_scale").shape[1]
            assert 8 * size / (columns * 64) <= 8.3


class TestDial:
    def test_a_budget_for_one_call_leaves_the_dial_where_it_was(self, model: Any) -> None:
        model.set_bits(6)
        generate(model, bits=2)
        assert model.budget == 6
        assert model.bits_used().code_bits == 2
        assert model.bits_used().n_tokens == 2 * (12 + 5)

    def test_each_row_of_a_batch_is_what_it_is_alone(self, model: Any) -> None:
        together = generate(model, bits=torch.tensor([2.0, 8.0]))
        assert model.bits_used().per_row == [2.0, 8.0]
        for row, bits in enumerate((2.0, 8.0)):
            assert torch.equal(together[row], generate(model, IDS[row : row + 1], bits=bits)[0])

    def test_rows_keep_their_budgets_under_beam_search(self, model: Any) -> None:
        together = generate(model, bits=[2.0, 8.0], num_beams=3)
        assert model.bits_used().per_row == [2.0, 8.0]
        for row, bits in enumerate((2.0, 8.0)):
            assert torch.equal(together[row], generate(model, IDS[row : row + 1], bits=bits, num_beams=3)[0])

    def test_padding_in_front_of_a_row_is_not_counted(self, model: Any) -> None:
        mask = torch.ones_like(IDS)
        mask[0, :7] = 0
        generate(model, attention_mask=mask, bits=3.3)
        assert model.bits_used().n_tokens == 2 * 12 - 7 + 2 * 5

    @pytest.mark.parametrize(
        ("bits", "message"), [([2.0, 3.0, 4.0], "3 budgets for a batch of 2"), (1, "1 bits"), (9, "9 bits")]
    )
    def test_impossible_budgets_are_refused_and_change_nothing(self, model: Any, bits: Any, message: str) -> None:
        model.set_bits(4)
        with pytest.raises(BitsError, match=message):
            generate(model, bits=bits)
        assert model.budget == 4

    def test_rows_that_do_not_match_a_forward_pass_are_refused(self, model: Any) -> None:
        with pytest.raises(BitsError, match="3 budgets were set"), model.bits([2.0, 3.0, 4.0]):
            model(IDS)

    def test_the_dial_may_turn_between_tokens_and_the_cache_is_kept(self, model: Any) -> None:
        """The first tokens at 8 bits, the rest at 2, equal the same done by hand with one cache."""

        def turn(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            model.set_bits(2.0 if ids.shape[1] >= 14 else 8.0)
            return scores

        model.set_bits(8.0)
        turned = generate(model, logits_processor=[turn], max_new_tokens=8)
        used = model.bits_used()
        ids, cache, name = IDS, None, cache_name(model)
        for step in range(8):
            with torch.no_grad(), model.bits(8.0 if step < 3 else 2.0):
                out = model(ids if cache is None else ids[:, -1:], **{name: cache}, use_cache=True)
            cache, ids = out[name], torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(turned, ids)
        assert used.code_bits == pytest.approx((14 * 8 + 5 * 2) / 19)

    def test_a_static_cache_gives_the_same_tokens(self, model: Any) -> None:
        for bits in (2.5, [3.3, 6.0]):
            static = generate(model, bits=bits, cache_implementation="static")
            assert torch.equal(static, generate(model, bits=bits))

    def test_per_layer_figures_average_to_the_whole(self, model: Any) -> None:
        logits(model, 3.3)
        used = model.bits_used(per_layer=True)
        assert list(used.per_layer) == input_names(model)
        assert "model.layers.1.mlp.down_proj" in used.per_layer
        sizes = [routed.n_weights for routed in model.dial.inputs]
        mean = sum(b * n for b, n in zip(used.per_layer.values(), sizes, strict=True)) / sum(sizes)
        assert used.code_bits == pytest.approx(mean)

    def test_it_compiles_whole_and_the_dial_turns_without_compiling_again(self, model: Any) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        mask = torch.ones_like(IDS)
        mask[0, :3] = 0
        model.set_bits(4)
        with torch.no_grad():
            compiled(IDS, attention_mask=mask)
            with torch.compiler.set_stance("fail_on_recompile"):
                for bits in (2, 2.3, 3.9, 8):
                    model.set_bits(bits)
                    ours = compiled(IDS, attention_mask=mask).logits
                    counted = model.bits_used()
                    model.set_bits(bits)
                    torch.testing.assert_close(ours, model(IDS, attention_mask=mask).logits, atol=1e-4, rtol=1e-4)
                    assert counted == model.bits_used()
                    assert counted.n_tokens == 2 * 12 - 3

    def test_a_hundred_turns_leave_nothing_behind(self, model: Any) -> None:
        import gc

        def turn(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            model.set_bits(2 + (ids.shape[1] * 0.37) % 6)
            return scores

        def tensors_alive() -> int:
            gc.collect()
            return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

        generate(model, logits_processor=[turn], max_new_tokens=2)
        before = tensors_alive()
        generate(model, logits_processor=[turn], max_new_tokens=100)
        assert tensors_alive() == before


class TestWriting:
    def test_a_shard_that_was_damaged_before_the_end_is_written_again(
        self, make_model: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finish, found = CheckpointWriter.finish, []

        def damage_first(self: CheckpointWriter, *arguments: Any) -> Any:
            shards = sorted(self.partial.glob("*.safetensors"))
            assert len(shards) == 2, "every block was written when it was done"
            edit_tensors(self.partial, lambda t: t.update({PLANE: t[PLANE] ^ 1}))
            found.append(finish(self, *arguments))
            return found[-1]

        monkeypatch.setattr(CheckpointWriter, "finish", damage_first)
        assert main(["fit", *small_recipe(make_model(), text_file, tmp_path)]) == 0
        assert found == [[0]]
        assert verify(tmp_path / "run") == []
        assert not (tmp_path / "run" / "elastic.partial").exists()

    def test_provenance_recipe_and_results_lie_with_the_tensors(self, finished: Run) -> None:
        elastic = finished[0] / "elastic"
        provenance = json.loads((elastic / "provenance.json").read_text())
        assert provenance["calibration"]["n_samples"] == 8
        assert len(provenance["calibration"]["data_hash"]) >= 16
        assert provenance["seed"] == 0
        assert provenance["environment"]["torch"] == torch.__version__
        assert yaml.safe_load((elastic / "recipe.yaml").read_text())["data"]["seq_len"] == 32
        assert read_results(elastic / "results.json") == for_others(finished[0] / "results.json")
        for path in elastic.glob("*"):
            if path.suffix != ".safetensors":
                assert str(finished[0].parent) not in path.read_text(), path

    def test_the_card_shows_how_to_load_and_what_was_measured(self, finished: Run) -> None:
        text = (finished[0] / "elastic" / "README.md").read_text()
        rows = json.loads((finished[0] / "results.json").read_text())["rows"]
        router = next(r for r in rows if r["allocation"] == "router" and r["target_bits"] == 2.5)
        assert f"| router | 2.5 | {router['used_bits']:.2f} |" in text
        assert f"{router['perplexity']:.2f}" in text
        code = text.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(finished[0] / "elastic"))
        exec(compile(code, "README.md", "exec"), {})

    def test_plug_ins_are_named_by_their_public_paths(self, finished: Run) -> None:
        elastic = finished[0] / "elastic"
        config = json.loads((elastic / "config.json").read_text())["quantization_config"]
        assert config["router"]["class_path"] == "mobiq_lightning.strategies.MLPRouter"
        assert config["router"]["init_args"] == {"hidden_features": 4}
        assert config["transform"]["class_path"] == "mobiq_lightning.strategies.NoTransform"
        assert json.loads((elastic / "provenance.json").read_text())["transform"] == {
            "class_path": "mobiq_lightning.strategies.NoTransform",
            "init_args": {},
        }

    def test_others_may_read_the_files(self, finished: Run) -> None:
        modes = {path.stat().st_mode & 0o777 for path in (finished[0] / "elastic").iterdir()}
        assert len(modes) == 1

    def test_inspect_prints_what_it_holds(self, finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", str(finished[0])]) == 0
        output = " ".join(capsys.readouterr().out.split())
        for expected in (
            "LlamaForCausalLM, 2 blocks",
            "8 planes held",
            "8 x MLPRouter",
            "round to nearest",
            "8 x 32 tokens",
        ):
            assert expected in output
