"""Classes that a recipe names, asked without running anything that the recipe names."""

from __future__ import annotations

import sys
from typing import Any


def loaded_class(named: Any, home: str = "") -> type | None:
    """The class that a part of a recipe names, if the module that holds it is loaded already.

    Nothing is imported: a recipe that lies in a folder must not run code just because the folder is looked at.

    Args:
        named: A dotted path, or a mapping with one under ``class_path``.
        home: Module in which a name without dots is looked up.

    Returns:
        None if the module is not loaded, or holds no such class.
    """
    path = named.get("class_path") if isinstance(named, dict) else named
    module, _, name = str(path).rpartition(".")
    loaded = sys.modules.get(module or home)
    found = None if loaded is None else vars(loaded).get(name)  # getattr could make a lazy module import something
    return found if isinstance(found, type) else None
