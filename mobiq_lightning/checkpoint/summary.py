"""Sums up what a checkpoint holds from its headers and notes; no weight is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mobiq_lightning.checkpoint.check import describe_problems, shape_problems
from mobiq_lightning.checkpoint.contents import read_contents
from mobiq_lightning.checkpoint.format import ElasticFormat
from mobiq_lightning.checkpoint.load_call import LoadCall, answering, current_call
from mobiq_lightning.checkpoint.loading import resolve
from mobiq_lightning.checkpoint.named_classes import router_class
from mobiq_lightning.checkpoint.provenance import read_provenance
from mobiq_lightning.checkpoint.quantizer import expected_tensors, insert_elastic_linears
from mobiq_lightning.errors import CheckpointError, MobiqError, UntrustedClassError
from mobiq_lightning.nn import ElasticLinear, routed_inputs, stored_layout
from mobiq_lightning.packing import TensorKind, depths_of, kind_of
from mobiq_lightning.runs import CONFIG, RESULTS, Results, read_results
from mobiq_lightning.strategies import StaticRouter
from mobiq_lightning.strategies.class_paths import public_path

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
        knows_router: Whether the class of the routers was looked at; one of somebody's own is not, without consent.
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
    knows_router: bool = True
    n_planes: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    results: Results = field(default_factory=Results)

    @property
    def depths(self) -> list[int]:
        """Depths in bits at which the held slices can be read, ascending."""
        return [depth for depth in depths_of(tuple(self.config.slice_bits)) if depth <= self.n_planes]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(self.bytes_by_kind.values())

    def bits_per_weight(self, *kinds: str) -> float:
        """Stored bits of the given kinds of tensors together, per sliced weight."""
        return 8 * sum(self.bytes_by_kind[kind] for kind in kinds) / self.n_weights


def summarize_checkpoint(source: str | Path, trust_router: str | None = None) -> Summary:
    """Sums up a checkpoint from the headers of its shards, its config, its provenance and its results.

    Args:
        source: A run folder, an elastic checkpoint, or a Hugging Face hub id.
        trust_router: Dotted path of the checkpoint's router if it is none of this package, and may be imported.

    Raises:
        CheckpointError: If there is no elastic checkpoint, or files other than tensors, or headers, are damaged.
        ResultsError: If its results.json is damaged or from another version.
    """
    folder = resolve(source)
    contents = read_contents(folder)
    contents.require_whole("its summary would be wrong")
    elastic = contents.elastic
    with answering(LoadCall(trust_router=trust_router or current_call().trust_router)):
        built, knows = _without_foreign_router(elastic)
        model = skeleton(folder, built)
    expected = {name: tensor for name, tensor in expected_tensors(model).items() if knows or kind_of(name) != "router"}
    headers = {name: entry for name, entry in contents.headers.items() if knows or kind_of(name) != "router"}
    problems = shape_problems(headers, contents.where, expected)
    if problems:
        raise CheckpointError(describe_problems(folder, problems, "its summary would be wrong"))
    summary = Summary(folder, elastic, type(model).__name__)
    for name in contents.headers:
        summary.bytes_by_kind[_KINDS[kind_of(name)]] += contents.bytes_of(name)
    for module in model.modules():
        if isinstance(module, ElasticLinear):
            summary.linears[module.out_features, module.in_features] += 1
            summary.n_weights += module.out_features * module.in_features
            summary.n_planes = module.n_planes
    inputs = routed_inputs(model)
    summary.n_routers = len(inputs)
    summary.knows_router = knows
    summary.deployable = all(routed.router.deployable for routed in inputs)
    summary.n_blocks = len(stored_layout(elastic.layout).find(model))
    summary.provenance = read_provenance(folder)
    summary.results = read_results(folder / RESULTS)
    return summary


def _without_foreign_router(elastic: ElasticFormat) -> tuple[ElasticFormat, bool]:
    """A format whose routers can be built without importing anything of somebody's own; and whether they are its own."""
    try:
        router_class(elastic.router["class_path"])
    except UntrustedClassError:
        return replace(elastic, router={"class_path": public_path(StaticRouter), "init_args": {}}), False
    return elastic, True


def skeleton(folder: Path, elastic: ElasticFormat) -> Any:
    """Builds the model of a checkpoint with elastic linears, on the meta device: without any values.

    Args:
        folder: Folder of the checkpoint.
        elastic: The format of the checkpoint.

    Raises:
        CheckpointError: If no model can be built of its config.json.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            insert_elastic_linears(model, elastic)
    except MobiqError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{folder / CONFIG}: no model can be built of it: {type(error).__name__}: {said}"
        ) from error
    return model
