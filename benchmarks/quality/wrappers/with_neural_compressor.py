"""GPTQ, AWQ and TEQ of Intel Neural Compressor."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..peer import Peer, Task, set_weight


def run(task: Task, method: str, **settings: Any) -> Any:
    from neural_compressor.torch import quantization as inc

    kind = getattr(inc, f"{method}Config")
    config = kind(dtype="int", bits=task.bits, group_size=task.group_size, use_sym=False, **settings)
    config.set_local("lm_head", kind(dtype="fp32"))
    more = {} if method == "GPTQ" else {"example_inputs": task.calibration[:1]}
    prepared: Any = inc.prepare(task.protocol.load().model, config, **more)
    with torch.no_grad():
        for batch in task.batches(1):
            prepared(**batch)
    converted: Any = inc.convert(prepared)
    for name, linear in task.linears():
        set_weight(linear, dequantize(converted.get_submodule(name)))
    copy_norms(converted, task.model)
    return task.model


def dequantize(module: Any) -> torch.Tensor:
    """Weight (O, I) of a linear that it converted; AWQ leaves a factor on the input."""
    if type(module).__name__ == "MulLinear":
        scaled: torch.Tensor = dequantize(module.linear) * module.input_scale[None]
        return scaled
    weight: torch.Tensor = module.recover() if hasattr(module, "recover") else module.weight
    return weight


def copy_norms(converted: Any, model: Any) -> None:
    """AWQ and TEQ fold scales into norms."""
    mine = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in converted.named_parameters():
            if "norm" in name:
                mine[name].copy_(parameter)


PEERS = [
    Peer("GPTQ (INC)", partial(run, method="GPTQ"), "neural-compressor-pt", "plain, no act-order"),
    Peer(
        "AWQ (INC)", partial(run, method="AWQ"), "neural-compressor-pt", "scales and clipping searched", on_grid=False
    ),
    Peer("TEQ (INC)", partial(run, method="TEQ"), "neural-compressor-pt", "its defaults", on_grid=False),
]
