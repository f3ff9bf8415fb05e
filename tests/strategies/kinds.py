"""Every concrete strategy that lies under strategies/, in whatever file, exported or not."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from mobiq_lightning import strategies
from mobiq_lightning.jobs.known_names import strategy_classes

for module in pkgutil.walk_packages(strategies.__path__, f"{strategies.__name__}."):
    importlib.import_module(module.name)


def subclasses(base: type) -> list[type]:
    """All concrete classes under strategies/ below a base."""
    found = [c for sub in base.__subclasses__() for c in (sub, *subclasses(sub))]
    own = [c for c in found if c.__module__.startswith("mobiq_lightning.strategies")]
    return [c for c in dict.fromkeys(own) if not inspect.isabstract(c)]


def unexported(folder: str, base: type) -> list[str]:
    """Names of concrete classes below a base that the package of their kind does not export."""
    return sorted({c.__name__ for c in subclasses(base)} - set(strategy_classes(folder)))
