"""How a job ends before its time: signals, limits, a full disk; and what is said of it."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from mobiq_lightning.calibration import SafeCheckpointIO, can_be_read, say_if_short
from mobiq_lightning.callbacks import LayerGains
from mobiq_lightning.checkpoint import verify
from mobiq_lightning.cli import main
from mobiq_lightning.errors import CheckpointError, DiskError, MobiqError
from mobiq_lightning.jobs import ElasticCLI, disk_errors, exit_code, interruptible
from mobiq_lightning.jobs.lost_process import lost_process
from mobiq_lightning.runs import RunFolder
from tests.checkpoints import tensors_of
from tests.conftest import Run


def in_folder(arguments: list[str], folder: Path) -> list[str]:
    return [*(a for a in arguments if "default_root_dir" not in a), f"--trainer.default_root_dir={folder}"]


def assert_same(one: Path, other: Path) -> None:
    first, second = tensors_of(one / "elastic"), tensors_of(other / "elastic")
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_a_pipe_that_nobody_reads_any_more_ends_a_fit_without_a_traceback(
    finished: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as of `| head` when it has had enough
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert main(["fit", *finished[1]]) == 141
    said = capsys.readouterr().err
    assert "holds this run, finished" in said
    assert "Traceback" not in said
    assert "error" not in said


def test_damaged_results_are_said_before_a_finished_run_is_compared_again_wherever_it_was_moved(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished[0], tmp_path / "moved")
    recipe = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        recipe.replace(f"default_root_dir: {finished[0]}", "default_root_dir: runs/before")
    )
    (run / "results.json").write_text('{"rows": [')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ElasticCLI, "instantiate_classes", lambda _: pytest.fail("work was begun"))
    for given in (str(run), "moved", str(run / "config.yaml"), "moved/config.yaml"):
        assert main(["validate", given]) == 1
        assert (
            f"{Path(given).parent / 'results.json' if given.endswith('yaml') else Path(given) / 'results.json'}"
            in (capsys.readouterr().err.partition("error: ")[2])
        )
    assert not (tmp_path / "runs").exists()


class TestSignals:
    @pytest.mark.parametrize(
        ("number", "code", "said"),
        [
            (signal.SIGTERM, 143, "terminated (SIGTERM); it goes on"),
            (signal.SIGHUP, 129, "terminated (SIGHUP); it goes on"),
            (signal.SIGINT, 130, "interrupted; it goes on"),
        ],
    )
    def test_a_signal_ends_a_job_with_a_line_and_its_code(
        self, number: signal.Signals, code: int, said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = signal.getsignal(number)

        def job() -> None:
            with interruptible("it goes on"):
                os.kill(os.getpid(), number)
                raise AssertionError

        assert exit_code(job) == code
        assert capsys.readouterr().err == said + "\n"
        assert signal.getsignal(number) == before

    def test_a_signal_that_the_process_ignores_stays_ignored(self) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with interruptible(""):
                os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_sigterm_ends_a_fit_at_once_while_layer_gains_are_probed_and_the_same_command_goes_on(
        self,
        finished: Run,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def measured(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        arguments = in_folder(finished[1], tmp_path / "run")
        with monkeypatch.context() as patched:
            patched.setattr(LayerGains, "measure", measured)
            assert main(["fit", *arguments]) == 143
        kept = "terminated (SIGTERM); 4 finished epochs are kept; the same command goes on after them"
        assert capsys.readouterr().err.splitlines()[-1] == kept
        assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.name in ("results.json", ".lock")) == []
        monkeypatch.setattr("mobiq_lightning.calibration.module.comparison_of_run", measured)
        assert main(["fit", *arguments]) == 143
        assert "4 finished epochs are kept" in capsys.readouterr().err.splitlines()[-1]
        assert_same(tmp_path / "run", finished[0])
        assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize(
    ("limit", "said", "kept"),
    [
        ("--trainer.max_steps=3", "trainer.max_steps (3) ended the run after 1 of 4 epochs and 1 of 2 steps", 1),
        ("--trainer.fast_dev_run=true", "trainer.fast_dev_run ended the run after 1 of 4 epochs", 0),
        ("--trainer.max_time=00:00:00:00", "a timer", 0),
    ],
)
def test_a_run_cut_short_is_not_exported_and_goes_on_without_the_limit(
    finished: Run,
    tmp_path: Path,
    limit: str,
    said: str,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Trainer, "validate", lambda *_, **__: None)  # for the time that it takes
    run, arguments = tmp_path / "run", in_folder(finished[1], tmp_path / "run")
    assert main(["fit", *arguments, limit]) == 1
    assert said in capsys.readouterr().err
    assert not (run / "elastic").exists()
    assert RunFolder(run).epochs_kept == kept
    if kept:
        assert main(["fit", *arguments]) == 0
        assert_same(run, finished[0])


class TestDamage:
    def test_a_finished_run_whose_checkpoint_is_damaged_is_built_again(
        self, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = shutil.copytree(finished[0], tmp_path / "run")
        shard = run / "elastic" / "model-00001-of-00003.safetensors"
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 0xFF
        shard.write_bytes(data)
        before = (run / "results.json").read_bytes()
        assert main(["verify", str(run)]) == 1
        assert f"fit {run}` builds it again from checkpoints/" in capsys.readouterr().err
        assert main(["fit", *in_folder(finished[1], run)]) == 0
        assert f"{run / 'elastic'} is damaged: {shard.name}" in capsys.readouterr().err
        assert verify(run) == []
        assert (run / "results.json").read_bytes() == before
        assert (run / "elastic" / "speed.json").is_file() == (finished[0] / "elastic" / "speed.json").is_file()
        assert_same(run, finished[0])

    def test_without_training_checkpoints_it_is_said_what_is_left_to_do(
        self, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = shutil.copytree(finished[0], tmp_path / "run")
        (run / "elastic" / "model-00002-of-00003.safetensors").unlink()
        shutil.rmtree(run / "checkpoints")
        assert main(["fit", *in_folder(finished[1], run)]) == 1
        error = capsys.readouterr().err
        assert "model-00002-of-00003.safetensors is missing" in error
        assert "put back a copy, or --overwrite to calibrate again" in error


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_a_training_checkpoint_that_would_run_code_is_not_loaded_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "checkpoints").mkdir()
    good, bomb, plain = (tmp_path / "checkpoints" / f"epoch-00000{n}.ckpt" for n in range(3))
    torch.save({"state_dict": {"a": torch.ones(1)}}, good)
    torch.save({"state_dict": Bomb(tmp_path / "boom")}, bomb)
    plain.write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    for path in (good, bomb, plain):
        path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    assert RunFolder(tmp_path).training.newest(can_be_read) == (good, [plain, bomb])
    assert SafeCheckpointIO().load_checkpoint(good)["state_dict"]["a"] == 1
    for path in (bomb, plain):
        with pytest.raises(CheckpointError, match="damaged, or not safe to load"):
            SafeCheckpointIO().load_checkpoint(path)
    assert not (tmp_path / "boom").exists()


class TestDisk:
    @pytest.mark.parametrize(
        ("number", "said"),
        [
            (errno.ENOSPC, r"no space left on device \([0-9.]+ MB are free on its disk\); make room there; 3 are kept"),
            (errno.EROFS, "read-only file system; give a place that can be written to; 3 are kept"),
            (errno.EMFILE, r"too many open files; allow more open files \(`ulimit -n`\); 3 are kept"),
        ],
    )
    def test_what_the_system_refuses_is_a_line_with_the_path_and_what_to_do(
        self, tmp_path: Path, number: int, said: str
    ) -> None:
        with pytest.raises(DiskError, match=f"{tmp_path / 'a.ckpt'}: {said}"), disk_errors(lambda: "3 are kept"):
            raise OSError(number, os.strerror(number), str(tmp_path / "a.ckpt"))

    def test_a_command_ends_with_a_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert exit_code(lambda: Path("/nowhere/at/all").write_text("")) == 1
        assert capsys.readouterr().err == "error: /nowhere/at/all: no such file or directory\n"

    def test_too_little_room_is_said_before_any_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("mobiq_lightning.calibration.disk_space.bytes_of_run", lambda module: module.needed)
        module: Any = SimpleNamespace(run_folder=tmp_path, needed=1000)
        say_if_short(module)
        assert capsys.readouterr().err == ""
        module.needed = 10**18
        say_if_short(module)
        assert "MB are free on its disk, and this run will need about 1000000000000.0 MB" in capsys.readouterr().err


def test_a_lost_process_is_a_line_and_other_errors_stay_what_they_are() -> None:
    trainer: Any = SimpleNamespace(world_size=2, global_rank=0)
    lost = r"rank 0 of 2 has lost another process.*; it goes on"
    with pytest.raises(MobiqError, match=lost), lost_process(trainer, lambda: "it goes on"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4")
    with pytest.raises(RuntimeError, match="shapes"), lost_process(trainer, lambda: ""):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("enable_checkpointing=false", "trainer.enable_checkpointing=False: a run goes on"),
        ("barebones=true", "trainer.barebones=True"),
        ("max_epochs=3", "model.epochs_per_block"),
        ("limit_train_batches=0", "data.n_samples"),
        ("limit_val_batches=0.5", "data.eval_max_windows"),
        ("overfit_batches=1", "trainer.overfit_batches=1"),
        ("accumulate_grad_batches=0", "give 1 or more"),
        ("gradient_clip_val=-1", "give 0 or more"),
        ("val_check_interval=100", "leave it out"),
        ("precision=bf16-mixed", "set model.dtype"),
        ("accelerator=tpu", "give --trainer.accelerator cpu"),
        ("devices=0", "devices"),
        ("devices=2", "use ddp_find_unused_parameters_true"),
        ("strategy=foo", "invalid strategy name"),
        ("num_nodes=0", "num_nodes"),
        ("profiler=foo", "profiler"),
        ("gradient_clip_algorithm=foo", "gradient_clip_algorithm"),
        ("default_root_dir=", "trainer.default_root_dir="),
        ("default_root_dir=null", "trainer.default_root_dir="),
    ],
)
def test_settings_of_the_trainer_that_cannot_work_are_refused_in_a_line_before_any_work(
    recipe_arguments: list[str], tmp_path: Path, setting: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *recipe_arguments, f"--trainer.{setting}"]) == 2
    error = capsys.readouterr().err
    assert "error: trainer" in error
    assert said in error
    assert not (tmp_path / "run" / "identity.json").exists()
