"""The classes that config.json names: its router, and what is stored of its transform.

config.json may come from anybody, so it chooses among the routers of this package. A router of one's own is imported only
if the caller names it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from mobiq_lightning import strategies
from mobiq_lightning.checkpoint.load_call import current_call
from mobiq_lightning.errors import CheckpointError, UntrustedClassError
from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.transform_base import StoredTransform


def router_class(class_path: str) -> type[Router]:
    """The class of the router that config.json names.

    Args:
        class_path: Dotted path of the class. Of one of this package the last part counts: older checkpoints name its file.

    Raises:
        UntrustedClassError: If it is no router of `mobiq_lightning.strategies`, and the caller of `load` has not said that
            it may be used.
        CheckpointError: If it cannot be imported, or is no router.
    """
    module, _, name = class_path.rpartition(".")
    if module == strategies.__name__ or module.startswith(f"{strategies.__name__}."):
        found: Any = vars(strategies).get(name)
    elif class_path == current_call().trust_router:
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"this elastic checkpoint was made with {class_path}, which cannot be imported here ({error}). Put the "
                "folder of its file into PYTHONPATH, or run `python -m mobiq_lightning` from there"
            ) from error
    else:
        named = current_call().trust_router
        instead = f" (trust_router says {named})" if named is not None else ""
        raise UntrustedClassError(
            f"config.json names {class_path} as router, which is none of {strategies.__name__}{instead}. Nothing was imported: "
            "a checkpoint may not choose code that is run. If you know and trust that class, name it: "
            f"mobiq_lightning.load(..., trust_router={class_path!r}), or --trust-router {class_path}; plain from_pretrained "
            "takes no such argument"
        )
    if not (isinstance(found, type) and issubclass(found, Router)):
        raise CheckpointError(f"config.json names {class_path} as router, which is no {strategies.__name__}.Router")
    return found


def build_router(spec: Mapping[str, Any], in_features: int, n_slices: int) -> Router:
    """Builds the router that config.json names, for one input.

    Args:
        spec: Mapping with ``class_path`` and ``init_args``.
        in_features: Width of the input.
        n_slices: Number of slices.

    Raises:
        CheckpointError: If `router_class` raises it, or the router cannot be built of these arguments.
    """
    cls = router_class(str(spec.get("class_path")))
    try:
        return cls(in_features, n_slices, **spec.get("init_args", {}))
    except Exception as error:
        raise CheckpointError(
            f"config.json: the router {cls.__name__} cannot be built of {dict(spec.get('init_args', {}))}: {error}"
        ) from error


def build_transform(stored: list[str], in_features: int) -> StoredTransform | None:
    """Makes the empty transform of an input, to be loaded from a checkpoint.

    Args:
        stored: Names of the tensors that the checkpoint holds of the transform.
        in_features: Width of the input.

    Returns:
        The transform, or None if the checkpoint holds no tensors of one.

    Raises:
        CheckpointError: If a tensor is named that this version does not know.
    """
    try:
        return StoredTransform(in_features, stored) if stored else None
    except ValueError as error:
        raise CheckpointError(
            f"config.json: transform.stored: {error}. The checkpoint is damaged, or newer than this version of "
            "mobiq-lightning"
        ) from error
