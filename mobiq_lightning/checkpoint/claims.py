"""What config.json claims of sizes, compared with the tensors that are there, before anything of those sizes is built."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mobiq_lightning.checkpoint.format import ElasticFormat
from mobiq_lightning.packing import plane_of

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Keys under which configurations of transformers say how many decoder blocks there are."""
_LARGEST = 2**40
"""A whole number that nothing in a configuration reaches."""


def exaggerations(config: Mapping[str, Any], elastic: ElasticFormat, tensors: Iterable[str]) -> list[str]:
    """Lists what config.json claims of blocks and planes that the tensors do not bear out, one line each.

    Sizes of single tensors are compared when the model is there without any memory; blocks are made one after the other, and
    a million of them take hours.

    Args:
        config: Content of config.json.
        elastic: The format that its `quantization_config` describes.
        tensors: Names of the tensors that the checkpoint holds.
    """
    names = list(tensors)
    block = re.compile(rf"{re.escape(elastic.layout.get('blocks', 'model.layers'))}\.(\d{{1,9}})\.")
    n_blocks = len({found.group(1) for name in names if (found := block.match(name))})
    n_planes = 1 + max((plane for name in names if (plane := plane_of(name)) is not None), default=-1)
    problems = [
        f"config.json: {key} is {claimed!r}; the tensors are those of {n_blocks} blocks"
        for key in _COUNTS
        if (claimed := config.get(key, n_blocks)) != n_blocks
    ]
    if elastic.n_planes != n_planes:
        problems.append(
            f"config.json: quantization_config claims {elastic.n_planes} planes of every weight; the tensors are those of "
            f"{n_planes}"
        )
    problems += [
        f"config.json: {key} is {value}, which no model has" for key, value in _numbers(config) if value > _LARGEST
    ]
    return problems


def _numbers(value: Any, key: str = "") -> Iterable[tuple[str, int]]:
    """Whole numbers in a configuration, without their signs, with the keys under which they are."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif type(value) is int:
        yield key, abs(value)
