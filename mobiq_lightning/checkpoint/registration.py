"""Makes `AutoModelForCausalLM.from_pretrained` know elastic checkpoints once this package is imported."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_WATCHED = "transformers.quantizers.auto"
_QUANTIZER = "mobiq_lightning.checkpoint.quantizer"


def register_with_transformers() -> None:
    """Registers the quantizer of elastic checkpoints with transformers, now or as soon as its registry is imported.

    Importing transformers here would make every import of this package, and every `--help`, wait for it and for PyTorch.
    """
    if _WATCHED in sys.modules:
        importlib.import_module(_QUANTIZER)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds the registry as everybody else does, and has the quantizer imported after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs another loader, then imports the quantizer.

    Args:
        loader: Loader of transformers' registry.
    """

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        importlib.import_module(_QUANTIZER)
