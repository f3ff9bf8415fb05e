"""How checkpoints name a plug-in class and its arguments, as recipes do: ``{"class_path", "init_args"}``."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

_FACE = "mobiq_lightning.strategies"


def public_path(cls: type) -> str:
    """Gives the dotted path by which a class is imported.

    Returns:
        For a class that `mobiq_lightning.strategies` exports, its path there, which does not change when its file moves;
        for any other, such as a router of one's own, the module that defines it.
    """
    exported = getattr(importlib.import_module(_FACE), cls.__name__, None) is cls
    return f"{_FACE}.{cls.__name__}" if exported else f"{cls.__module__}.{cls.__qualname__}"


def describe_class(cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Describes a class and the keyword arguments that it is built with, by ``{"class_path", "init_args"}``."""
    return {"class_path": public_path(cls), "init_args": dict(arguments)}


def describe_factory(factory: Callable[..., Any]) -> dict[str, Any]:
    """Describes what builds a plug-in, by ``{"class_path", "init_args"}``.

    Args:
        factory: A class, a `functools.partial` of one, or the partial that jsonargparse makes of a recipe's entry: of a
            function of its own, with the class among the positional arguments.

    Raises:
        TypeError: If the factory is anything else, such as a lambda, whose arguments cannot be written down.
    """
    made: Any = factory if isinstance(factory, functools.partial) else functools.partial(factory)
    found = next((part for part in (made.func, *made.args) if inspect.isclass(part)), None)
    if found is None:
        raise TypeError(
            f"a checkpoint cannot record how {factory!r} builds a plug-in; give a class, or a functools.partial of one"
        )
    return describe_class(found, made.keywords)
