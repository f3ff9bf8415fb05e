"""GPTQ and its relatives of GPTQModel. Scales are float16, as its format has them."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..peer import Peer, Task, set_weight, working_in

# On two cores its pool of workers is given one by default and then asked for two.
VARIABLES = (("GPTQMODEL_CPU_WORKERS", "2"),)


def run(task: Task, variant: str) -> Any:
    folder = str(task.source.folder.resolve())
    with working_in(task.scratch):  # the package leaves logs/ where it runs
        quantizer = _quantized(task, folder, variant)
    for name, linear in task.linears():
        set_weight(linear, quantizer.model.get_submodule(name).dequantize_weight().T)
    return task.model


def _quantized(task: Task, folder: str, variant: str) -> Any:
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization import config

    variants: dict[str, dict[str, Any]] = {
        "plain": {"desc_act": False, "act_group_aware": False},
        "group aware": {"desc_act": False, "act_group_aware": True},
        "clipped": {"desc_act": False, "act_group_aware": True, "mse": 2.4},
        "gptaq": {"desc_act": False, "act_group_aware": True, "gptaq": config.GPTAQConfig()},
        "gptaq clipped": {
            "desc_act": False,
            "act_group_aware": True,
            "mse": 2.4,
            "gptaq": config.GPTAQConfig(),
        },
        "awq": {"method": config.METHOD.AWQ, "format": config.FORMAT.GEMM},
    }
    settings = variants[variant]
    if variant != "awq":
        settings["format"] = config.FORMAT.GPTQ_V2  # the first format stores zeros less one
    quantization = QuantizeConfig(
        bits=task.bits, group_size=task.group_size, sym=False, device="cpu", offload_to_disk=False, **settings
    )
    quantizer: Any = GPTQModel.load(folder, quantization, dtype=torch.float32)
    windows = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in task.calibration]
    quantizer.quantize(windows, batch_size=8)
    return quantizer


def peer(name: str, variant: str, setting: str, bits: tuple[int, ...] = (2, 3, 4, 8)) -> Peer:
    return Peer(name, partial(run, variant=variant), "gptqmodel", setting, bits=bits, variables=VARIABLES)


PEERS = [
    peer("GPTQ (gptqmodel)", "plain", "plain, no act-order"),
    peer("GPTQ, group aware", "group aware", "its default: columns reordered within groups"),
    peer("GPTQ, clipped", "clipped", "group aware, ranges searched (mse 2.4)"),
    peer("GPTAQ (gptqmodel)", "gptaq", "group aware, with the asymmetric calibration of GPTAQ"),
    peer("GPTAQ, clipped", "gptaq clipped", "the same, ranges searched (mse 2.4)"),
    peer("AWQ (gptqmodel)", "awq", "its defaults", bits=(4,)),
]
