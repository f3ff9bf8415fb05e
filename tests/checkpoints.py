"""What the tests of the elastic checkpoint share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mobiq_lightning.checkpoint.check import hash_tensor
from mobiq_lightning.runs import HASHES

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


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], shard: int = 0) -> str:
    """Changes the tensors of a shard; returns its name."""
    path = sorted(folder.glob("*.safetensors"))[shard]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path.name


def rehash(folder: Path) -> None:
    """Hashes that fit the tensors: what is wrong was wrong when it was written."""
    hashes = json.loads((folder / HASHES).read_text())
    hashes["tensors"] = {name: hash_tensor(value) for name, value in tensors_of(folder).items()}
    (folder / HASHES).write_text(json.dumps(hashes))


PLANE = "model.layers.0.mlp.down_proj.plane_3"
Q = "model.layers.0.self_attn.q_proj"
