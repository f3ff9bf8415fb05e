"""Random models of the shapes of another with few of its decoder blocks, for measuring and for trying it out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

_MOST_KINDS = 6


def random_model(config: Any, kept: Sequence[int], device: torch.device) -> Any:
    """A model of the shapes of another, with random weights and some of its blocks.

    Args:
        config: The configuration of the model, of transformers; it is not changed.
        kept: Indices of the blocks that it has, of which lists in the configuration hold one value for each.
        device: Where to make it.
    """
    from transformers import AutoModelForCausalLM

    small = copy.deepcopy(config)
    inner = _inner(small)
    for name, values in _per_block(inner).items():
        setattr(inner, name, [values[index] for index in kept])
    inner.num_hidden_layers = len(kept)
    dtype = getattr(small, "dtype", None) or torch.float32
    model = AutoModelForCausalLM.from_config(small, dtype=dtype, trust_remote_code=False)
    return model.to(device).eval().requires_grad_(False)


def blocks_of_each_kind(config: Any) -> list[int]:
    """Indices of blocks that differ by what lists of a configuration say of them, such as ``layer_types``; two at least.

    Args:
        config: The configuration of the model, of transformers.
    """
    inner = _inner(config)
    rows = list(zip(*_per_block(inner).values(), strict=True)) or [()] * inner.num_hidden_layers
    first: dict[str, int] = {}
    for index, row in enumerate(rows):
        first.setdefault(repr(row), index)
    found = list(first.values())[:_MOST_KINDS]
    if len(found) == 1 and len(rows) > 1:
        found.append(1)
    return sorted(found)


def _inner(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _per_block(inner: Any) -> dict[str, list[Any]]:
    """The lists of a configuration that have one value for each block."""
    known = {name: value for name, value in vars(inner).items() if isinstance(value, (list, tuple))}
    return {name: list(value) for name, value in known.items() if len(value) == inner.num_hidden_layers}
