"""Nothing of a checkpoint is executed, and nothing outside of its folder is read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import mobiq_lightning
from mobiq_lightning.checkpoint import export, summarize_checkpoint, verify
from mobiq_lightning.cli import main
from mobiq_lightning.errors import CheckpointError
from mobiq_lightning.runs import HASHES, INDEX
from tests.checkpoints import edit_json, logits, rehash, tensors_of

PAYLOAD = """
import os, pathlib
pathlib.Path(os.environ["RAN"]).write_text("ran")
from mobiq_lightning.strategies import MLPRouter as Router
"""
READERS: dict[str, Callable[[Path], object]] = {
    "load": mobiq_lightning.load,
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
    "inspect": summarize_checkpoint,
    "export": lambda folder: export(folder, folder.parent / "copy"),
    "verify": lambda folder: refuse_damage(verify(folder)),
}
"""All ways in."""


def refuse_damage(problems: list[str]) -> None:
    if problems:
        raise CheckpointError("\n".join(problems))


@pytest.fixture(params=READERS)
def read(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    return READERS[request.param]


@pytest.fixture
def hostile(elastic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkpoint that names a router of its own, in a file beside its tensors, which Python finds."""
    (elastic / "payload.py").write_text(PAYLOAD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    name_router(elastic, "elastic.payload.Router", hidden_features=4)
    yield elastic
    sys.modules.pop("elastic.payload", None)
    sys.modules.pop("elastic", None)


def name_router(folder: Path, class_path: str, **arguments: Any) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["quantization_config"]["router"] = {"class_path": class_path, "init_args": arguments}

    edit_json(folder, "config.json", edit)
    rehash(folder)


class TestCode:
    @pytest.mark.parametrize("name", ["load", "from_pretrained", "verify"])  # those that need the router
    def test_a_router_that_a_checkpoint_brings_is_not_imported(self, hostile: Path, tmp_path: Path, name: str) -> None:
        with pytest.raises(CheckpointError, match=r"elastic\.payload\.Router .* Nothing was imported"):
            READERS[name](hostile)
        assert not (tmp_path / "ran").exists()
        assert "elastic.payload" not in sys.modules

    def test_a_copy_is_made_without_importing_it_and_without_its_code(self, hostile: Path, tmp_path: Path) -> None:
        (hostile / "later.py").write_text("")  # has no hash
        export(hostile, tmp_path / "copy")
        assert not (tmp_path / "ran").exists()
        assert not (tmp_path / "copy" / "later.py").exists()

    def test_what_it_holds_is_shown_without_importing_it(
        self, hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["inspect", str(hostile)]) == 0
        assert "elastic.payload.Router (not imported)" in capsys.readouterr().out
        assert not (tmp_path / "ran").exists()

    def test_a_command_runs_it_if_it_is_named_there(self, hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", str(hostile)]) == 1
        output = capsys.readouterr()
        assert "--trust-router elastic.payload.Router" in output.err
        assert "DAMAGED" not in output.out
        assert "builds it again" not in output.err, "which would run the code"
        assert main(["verify", str(hostile), "--trust-router", "elastic.payload.Router"]) == 0
        assert main(["generate", str(hostile), "--prompt", "a", "--trust_router=elastic.payload.Router"]) == 0
        assert main(["generate", str(hostile), "--prompt", "a"]) == 1, "consent is for one command"

    def test_consent_to_another_router_is_none(self, hostile: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="Nothing was imported"):
            mobiq_lightning.load(hostile, trust_router="elastic.payload.Other")
        assert not (tmp_path / "ran").exists()

    def test_a_router_that_the_caller_names_is_run_for_that_call_alone(self, hostile: Path, uncalibrated: Path) -> None:
        own = mobiq_lightning.load(hostile, trust_router="elastic.payload.Router")
        assert verify(hostile, trust_router="elastic.payload.Router") == []
        assert summarize_checkpoint(hostile, trust_router="elastic.payload.Router").deployable
        assert (logits(own, 3.3) == logits(mobiq_lightning.load(uncalibrated), 3.3)).all()
        with pytest.raises(CheckpointError, match="Nothing was imported"):
            mobiq_lightning.load(hostile)

    @pytest.mark.parametrize(
        "path", ["subprocess.Popen", "os.system", "builtins.exec", "", "Router", "mobiq_lightning.strategies"]
    )
    def test_no_other_callable_is_called(self, elastic: Path, path: str) -> None:
        name_router(elastic, path, args="touch /tmp/ran")
        with pytest.raises(CheckpointError, match=r"Nothing was imported"):
            mobiq_lightning.load(elastic)

    @pytest.mark.parametrize("name", ["NoTransform", "ResidualSlices", "ThresholdTask", "Router", "os"])
    def test_what_is_no_router_that_can_be_built_is_refused(self, elastic: Path, name: str, read: Any) -> None:
        name_router(elastic, f"mobiq_lightning.strategies.{name}")
        if read is READERS["export"]:
            return  # it builds nothing
        with pytest.raises(CheckpointError, match=r"no mobiq_lightning\.strategies\.Router|cannot be built"):
            read(elastic)

    def test_the_class_of_a_transform_is_not_imported(self, elastic: Path) -> None:
        transform = {"class_path": "antigravity.Transform", "init_args": {}, "stored": []}
        edit_json(elastic, "config.json", lambda config: config["quantization_config"].update(transform=transform))
        rehash(elastic)
        mobiq_lightning.load(elastic)
        assert "antigravity" not in sys.modules

    def test_remote_code_is_off_without_a_question(self, elastic: Path, tmp_path: Path) -> None:
        (elastic / "code.py").write_text(PAYLOAD + "\nclass Config: pass\n")
        automatic = {
            "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Config"},
            "model_type": "x",
        }
        edit_json(elastic, "config.json", lambda config: config.update(automatic))
        rehash(elastic)
        found = subprocess.run(
            [sys.executable, "-m", "mobiq_lightning", "inspect", str(elastic)],
            input="y\n" * 9,
            capture_output=True,
            text=True,
            env={**os.environ, "RAN": str(tmp_path / "ran")},
            check=False,
        )
        assert found.returncode == 1
        assert found.stderr.startswith("error: ")
        assert "Traceback" not in found.stderr
        assert "y/N" not in found.stdout + found.stderr
        assert not (tmp_path / "ran").exists()


class TestFolder:
    """What lies elsewhere is refused by name, by every way in."""

    def refused(self, folder: Path, read: Callable[[Path], object], message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            read(folder)

    @pytest.mark.parametrize(
        "name", ["../outside.safetensors", "/outside.safetensors", "", "a/b.safetensors", "config.json", 3]
    )
    def test_an_index_that_leads_out_of_the_folder(self, elastic: Path, read: Any, name: Any) -> None:
        shard = sorted(elastic.glob("*.safetensors"))[0]
        shard.rename(elastic.parent / "outside.safetensors")

        def edit(index: dict[str, Any]) -> None:
            moved = [tensor for tensor, file in index["weight_map"].items() if file == shard.name]
            index["weight_map"] |= dict.fromkeys(moved, name)

        edit_json(elastic, INDEX, edit)
        self.refused(elastic, read, f"{re.escape(INDEX)}: .* which is no safetensors file beside it")

    @pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "..", ".", "a\\b", "a\0b", ""])
    def test_hashes_of_files_elsewhere(self, elastic: Path, read: Any, name: str) -> None:
        edit_json(elastic, HASHES, lambda hashes: hashes["files"].update({name: "0" * 64}))
        self.refused(elastic, read, r"outside of|no name of a file|not a regular file")

    def test_a_shard_that_is_a_link_to_elsewhere(self, elastic: Path, read: Any) -> None:
        shard = sorted(elastic.glob("*.safetensors"))[0]
        shard.rename(elastic.parent / "outside.safetensors")
        shard.symlink_to(elastic.parent / "outside.safetensors")
        self.refused(elastic, read, f"{shard.name} is a link that leads out of")

    @pytest.mark.parametrize("name", ["config.json", INDEX, HASHES, "tokenizer.json"])
    def test_another_file_that_is_a_link_to_elsewhere(self, elastic: Path, read: Any, name: str) -> None:
        (elastic / name).rename(elastic.parent / "secret")
        (elastic / name).symlink_to(elastic.parent / "secret")
        self.refused(elastic, read, f"{name} is a link that leads out of")

    def test_a_link_within_the_folder_is_followed(self, elastic: Path) -> None:
        (elastic / "tokenizer.json").rename(elastic / "real.json")
        (elastic / "tokenizer.json").symlink_to("real.json")
        assert verify(elastic) == []

    def test_links_of_the_hubs_cache_are_followed(self, elastic: Path, tmp_path: Path) -> None:
        repository = tmp_path / "models--a--b"
        snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for number, path in enumerate(sorted(elastic.iterdir())):
            path.rename(blobs / str(number))
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
        assert verify(snapshot) == []
        mobiq_lightning.load(snapshot)

    @pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", INDEX, HASHES, "tokenizer.json"])
    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
    def test_what_is_no_regular_file_is_not_waited_for(
        self, elastic: Path, read: Any, name: str, make: Callable[[Path], None]
    ) -> None:
        (elastic / name).unlink()
        make(elastic / name)
        self.refused(elastic, read, f"{re.escape(name)} is a (named pipe|folder), not a regular file")

    @pytest.mark.parametrize(
        "name", [name for name in READERS if name != "from_pretrained"]
    )  # which opens it before us
    def test_a_config_that_is_no_regular_file_makes_no_checkpoint(self, elastic: Path, name: str) -> None:
        (elastic / "config.json").unlink()
        os.mkfifo(elastic / "config.json")
        self.refused(elastic, READERS[name], "holds no elastic checkpoint")

    def test_a_header_that_claims_more_than_any_header_has(self, elastic: Path, read: Any) -> None:
        shard = sorted(elastic.glob("*.safetensors"))[0]
        with shard.open("wb") as file:
            file.write((4 * 10**9).to_bytes(8, "little"))
            file.truncate(4 * 10**9 + 8)  # sparse
        self.refused(elastic, read, rf"{shard.name} is cut off or damaged: its header .* at most 100000000")

    def test_weights_that_the_configuration_names(self, elastic: Path) -> None:
        edit_json(elastic, "config.json", lambda config: config.update(transformers_weights="../x.safetensors"))
        rehash(elastic)
        for read in (READERS["load"], READERS["from_pretrained"]):
            self.refused(elastic, read, "transformers_weights names")


class TestClaims:
    """What config.json claims of sizes is compared with the tensors before anything of those sizes is built."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; the tensors are those of 2 blocks"),
            ({"num_hidden_layers": 1}, "num_hidden_layers is 1; the tensors are those of 2 blocks"),
            ({"vocab_size": 2**60}, "vocab_size is 1152921504606846976, which no model has"),
        ],
    )
    def test_sizes_of_the_whole_model(self, elastic: Path, read: Any, change: dict[str, Any], message: str) -> None:
        edit_json(elastic, "config.json", lambda config: config.update(change))
        rehash(elastic)
        with pytest.raises(CheckpointError, match=message):
            read(elastic)

    @pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "hidden_size"])
    @pytest.mark.parametrize("name", ["load", "inspect", "verify"])  # those that build the model
    def test_sizes_of_tensors(self, elastic: Path, key: str, name: str) -> None:
        edit_json(elastic, "config.json", lambda config: config.update({key: 2**30}))
        rehash(elastic)
        with pytest.raises(CheckpointError, match=r"has shape|cannot be loaded|no model can be built"):
            READERS[name](elastic)

    def test_slices_that_are_not_there(self, elastic: Path, read: Any) -> None:
        edit_json(elastic, "config.json", lambda config: config["quantization_config"].update(slice_bits=[2, 1, 1]))
        rehash(elastic)
        with pytest.raises(CheckpointError, match="claims 4 planes of every weight; the tensors are those of 8"):
            read(elastic)

    @pytest.mark.parametrize(
        ("hidden_features", "message"), [(60_000, r"router.* has shape"), (2**31, "cannot be built of")]
    )
    def test_a_router_that_would_fill_the_memory(
        self, elastic: Path, read: Any, hidden_features: int, message: str
    ) -> None:
        name_router(elastic, "mobiq_lightning.strategies.MLPRouter", hidden_features=hidden_features)
        with pytest.raises(CheckpointError, match=message):
            read(elastic)


def test_nothing_of_a_checkpoint_is_pickled(uncalibrated: Path) -> None:
    assert tensors_of(uncalibrated)
    assert {path.suffix for path in uncalibrated.iterdir()} <= {".safetensors", ".json", ".md", ".yaml", ".jinja", ""}
    assert json.loads((uncalibrated / HASHES).read_text())["tensors"].keys() == tensors_of(uncalibrated).keys()


class TestElsewhere:
    """What a checkpoint may not reach or choose, whoever names it."""

    @pytest.mark.parametrize(
        "key", ["attn_implementation", "_attn_implementation", "experts_implementation", "kernel_config"]
    )
    def test_code_of_the_hub(self, elastic: Path, key: str) -> None:
        named = {"x": "a/b:C"} if key == "kernel_config" else "kernels-community/anything"
        edit_json(elastic, "config.json", lambda config: config.update({key: named}))
        rehash(elastic)
        for name in ("load", "inspect", "verify", "export"):
            with pytest.raises(CheckpointError, match=f"{key} names .* may not choose what is fetched or run"):
                READERS[name](elastic)

    @pytest.mark.parametrize(
        "name", ["generation_config.json", "tokenizer.json", "results.json", "speed.json", "README.md"]
    )
    def test_links_to_elsewhere_that_no_hash_names(self, elastic: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / "secret").write_text("{}")
        (elastic / name).unlink(missing_ok=True)
        (elastic / name).symlink_to(tmp_path / "secret")
        edit_json(elastic, HASHES, lambda hashes: hashes["files"].pop(name, None))
        for read in READERS.values():
            with pytest.raises(CheckpointError, match=f"{name} is a link that leads out of"):
                read(elastic)

    @pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model-00001-of-00003.safetensors"])
    def test_saving_writes_through_no_link(self, uncalibrated: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / "victim").write_text("mine")
        (tmp_path / "to").mkdir()
        (tmp_path / "to" / name).symlink_to(tmp_path / "victim")
        with pytest.raises(CheckpointError, match=f"{name}: links; saving would change"):
            mobiq_lightning.load(uncalibrated).save_pretrained(tmp_path / "to")
        assert (tmp_path / "victim").read_text() == "mine"

    def test_damage_to_config_is_found_before_anything_is_made_of_it(self, elastic: Path) -> None:
        edit_json(elastic, "config.json", lambda config: config.update(num_labels=40_000))
        with pytest.raises(CheckpointError, match=r"config\.json is not what was written"):
            mobiq_lightning.load(elastic)
        edit_json(elastic, "config.json", lambda config: config.update(num_labels=10**9, rms_norm_eps=float("nan")))
        rehash(elastic)
        for name in ("load", "inspect", "verify", "export"):
            with pytest.raises(CheckpointError, match="num_labels is 1000000000") as refused:
                READERS[name](elastic)
            assert "rms_norm_eps is NaN" in str(refused.value)
