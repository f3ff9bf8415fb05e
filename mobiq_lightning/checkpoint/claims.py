"""What config.json claims of sizes and names of code, looked at before anything of it is built or fetched."""

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
_MOST_LABELS = 2**16
"""Labels of a classifier, each of which transformers makes a name for."""
_CODE = ("attn_implementation", "experts_implementation", "kernel_config", "transformers_weights")
"""Keys by which a configuration names code or files elsewhere, with and without a dash in front."""
_PLAIN = re.compile(r"[a-z0-9_]*")


def exaggerations(config: Mapping[str, Any], elastic: ElasticFormat, tensors: Iterable[str]) -> list[str]:
    """Lists what config.json claims of blocks and planes that the tensors do not bear out, and what it may not name.

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
    for key, value in _values(config):
        name = key.rpartition(".")[2].strip("_").removesuffix("_internal")
        if type(value) is int and abs(value) > (_MOST_LABELS if name == "num_labels" else _LARGEST):
            problems.append(f"config.json: {key} is {value}, which no model has")
        elif value != value:
            problems.append(f"config.json: {key} is NaN")
        elif name in _CODE and value is not None and not (isinstance(value, str) and _PLAIN.fullmatch(value)):
            problems.append(
                f"config.json: {key} names {str(value)[:80]!r}; a checkpoint may not choose what is fetched or run"
            )
    return problems


def _values(value: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    """Numbers, texts and the like in a configuration, with the keys under which they are; of what names code also mappings."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            path = f"{key}.{name}" if key else str(name)
            if str(name).strip("_").removesuffix("_internal") in _CODE and isinstance(inner, (Mapping, list)):
                yield path, inner
            yield from _values(inner, path)
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner, key)
    else:
        yield key, value
