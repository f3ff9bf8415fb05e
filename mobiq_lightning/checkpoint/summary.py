"""Sums up what a checkpoint holds from its headers and notes; no weight is loaded."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mobiq_lightning.checkpoint.check import read_header
from mobiq_lightning.checkpoint.format import QUANT_METHOD, ElasticFormat, is_elastic
from mobiq_lightning.checkpoint.loading import resolve
from mobiq_lightning.checkpoint.quantizer import insert_elastic_linears
from mobiq_lightning.errors import CheckpointError
from mobiq_lightning.nn import BlockLayout, ElasticLinear, routed_inputs
from mobiq_lightning.packing import TensorKind, depths_of, kind_of
from mobiq_lightning.runs import CONFIG, PROVENANCE, RESULTS, Results, read_results

SCALES, VALUE_TABLES = "scales and biases", "value tables"
"""Names in a summary of the tensors that turn codes into weights."""
_KINDS: dict[TensorKind, str] = {
    "plane": "planes",
    "scale": SCALES,
    "bias": SCALES,
    "table": VALUE_TABLES,
    "router": "routers",
    "transform": "transforms",
    "thresholds": "threshold tables",
    "budgets": "threshold tables",
    "other": "not sliced",
}


@dataclass
class Summary:
    """A summary of an elastic checkpoint.

    Args:
        folder: Folder of the checkpoint.
        config: The format of the checkpoint, as config.json has it.
        architecture: Name of the model's class.
        linears: Number of sliced linears of each shape (O, I).
        n_weights: Number of weights of the sliced linears.
        n_blocks: Number of decoder blocks.
        bytes_by_kind: Bytes of planes, scales and biases, value tables, routers, transforms, threshold tables, and all else.
        n_routers: Number of routers.
        deployable: Whether the routers can be deployed, rather than only say how good others could be.
        n_planes: Number of bit planes held of every weight.
        provenance: Content of provenance.json, empty if there is none.
        results: Content of results.json.
    """

    folder: Path
    config: ElasticFormat
    architecture: str
    linears: Counter[tuple[int, int]] = field(default_factory=Counter)
    n_weights: int = 0
    n_blocks: int = 0
    bytes_by_kind: Counter[str] = field(default_factory=Counter)
    n_routers: int = 0
    deployable: bool = True
    n_planes: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)
    results: Results = field(default_factory=Results)

    @property
    def depths(self) -> list[int]:
        """Depths in bits at which the held slices can be read, ascending."""
        return [depth for depth in depths_of(tuple(self.config.slice_bits)) if depth <= self.n_planes]

    def bits_per_weight(self, *kinds: str) -> float:
        """Stored bits of the given kinds of tensors together, per sliced weight."""
        return 8 * sum(self.bytes_by_kind[kind] for kind in kinds) / self.n_weights


def summarize_checkpoint(source: str | Path) -> Summary:
    """Sums up a checkpoint from the headers of its shards, its config, its provenance and its results.

    Args:
        source: A run folder, an elastic checkpoint, or a Hugging Face hub id.

    Raises:
        CheckpointError: If there is no elastic checkpoint, or a header is damaged.
        ResultsError: If its results.json is damaged or from another version.
    """
    folder = resolve(source)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    stored = config.get("quantization_config")
    if not is_elastic(stored):
        raise CheckpointError(f"{folder} holds no elastic model (its quant_method is not {QUANT_METHOD!r})")
    elastic = ElasticFormat.from_json(stored)
    model = skeleton(folder, elastic)
    summary = Summary(folder, elastic, type(model).__name__)
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in read_header(path).items():
            start, end = entry["data_offsets"]
            summary.bytes_by_kind[_KINDS[kind_of(name)]] += end - start
    for module in model.modules():
        if isinstance(module, ElasticLinear):
            summary.linears[module.out_features, module.in_features] += 1
            summary.n_weights += module.out_features * module.in_features
            summary.n_planes = module.n_planes
    inputs = routed_inputs(model)
    summary.n_routers = len(inputs)
    summary.deployable = all(routed.router.deployable for routed in inputs)
    summary.n_blocks = len(BlockLayout(**elastic.layout).find(model))
    if (folder / PROVENANCE).is_file():
        summary.provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    summary.results = read_results(folder / RESULTS)
    return summary


def skeleton(folder: Path, elastic: ElasticFormat) -> Any:
    """Builds the model of a checkpoint with elastic linears, on the meta device: without any values.

    Args:
        folder: Folder of the checkpoint.
        elastic: The format of the checkpoint.
    """
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        insert_elastic_linears(model, elastic)
    return model
