"""What the tests of the elastic checkpoint share."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mobiq_lightning.checkpoint import CheckpointWriter, ElasticFormat
from mobiq_lightning.checkpoint.check import hash_tensor
from mobiq_lightning.checkpoint.write import write_hashes
from mobiq_lightning.nn import BUDGET_STEP, BlockLayout, CalibratedBlock
from mobiq_lightning.runs import INDEX
from mobiq_lightning.sources import load_source
from mobiq_lightning.strategies import MLPRouter, ResidualSlices
from mobiq_lightning.strategies.class_paths import describe_factory

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
DEPTHS = (2, 3, 4, 6, 8)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def logits(model: Any, bits: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad(), model.bits(bits):
        return model(ids).logits  # type: ignore[no-any-return]


def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


def generate(model: Any, ids: torch.Tensor = IDS, **settings: Any) -> torch.Tensor:
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, **settings}
    return model.generate(ids, pad_token_id=0, **settings)  # type: ignore[no-any-return]


def write_checkpoint(model: Path, to: Path) -> Path:
    """Slices a source model without calibration and writes the checkpoint; its tokens read different depths."""
    layout, source = BlockLayout(), load_source(str(model))
    layout.open(source.model)
    scheme = functools.partial(ResidualSlices, slice_bits=[2, 1, 1, 2, 2], group_size=16)
    router = functools.partial(MLPRouter, hidden_features=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = [
            CalibratedBlock(b, layout.group_linears(b, "input"), scheme, router) for b in layout.find(source.model)
        ]
    for block in blocks:
        for routed in block.routed_inputs():
            table = torch.linspace(0.5, -4.5, len(routed.budgets)).expand(5, -1)
            routed.set_tables(table, table)
    stored = ElasticFormat(
        slice_bits=[2, 1, 1, 2, 2],
        group_size=16,
        router=describe_factory(router),
        layout=layout.to_stored(source.model),
        budget_step=BUDGET_STEP,
    )
    CheckpointWriter(source, layout, to).finish(blocks, stored, {})
    return to


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], shard: int = 0) -> str:
    """Changes the tensors of a shard; returns its name."""
    path = sorted(folder.glob("*.safetensors"))[shard]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path.name


def rehash(folder: Path) -> None:
    """Makes index and hashes fit what the folder holds now: what is wrong was wrong when it was written."""
    shards = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: path.name for path in shards for name in load_file(path)}
    (folder / INDEX).write_text(json.dumps(index))
    write_hashes(folder, {name: hash_tensor(value) for name, value in tensors_of(folder).items()})


def edit_json(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Changes what a JSON file of a checkpoint says; `rehash` makes its hash fit."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


PLANE = "model.layers.0.mlp.down_proj.plane_3"
Q = "model.layers.0.self_attn.q_proj"
