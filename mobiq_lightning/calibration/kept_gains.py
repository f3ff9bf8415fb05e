"""Layer gains while they are measured: what is known so far lies on disk, so that a killed run measures nothing twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mobiq_lightning.console import say
from mobiq_lightning.files import write_atomically

_KEY = "measured"


class KeptGains:
    """Tensors that were measured so far, with what they are of.

    Args:
        path: The file; None keeps nothing on disk.
        key: What is measured, and how: a file of anything else is not used.
    """

    def __init__(self, path: Path | None, key: Mapping[str, Any]) -> None:
        self.path, self._key = path, json.dumps(dict(key), sort_keys=True)
        self.tensors: dict[str, Tensor] = self._load()
        """By name, what is known; whoever adds to it calls `save`."""

    def _load(self) -> dict[str, Tensor]:
        if self.path is None or not self.path.is_file():
            return {}
        try:
            with safe_open(self.path, framework="pt") as file:
                if (file.metadata() or {}).get(_KEY) != self._key:
                    return {}
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (SafetensorError, OSError) as error:
            said = str(error).splitlines()[0][:120]
            say(f"{self.path.name} is damaged ({said}); layer gains are measured from the beginning.")
            return {}

    def save(self) -> None:
        """Writes what is known, atomically."""
        if self.path is None:
            return
        contents = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        write_atomically(self.path, lambda path: save_file(contents, path, {_KEY: self._key}))
