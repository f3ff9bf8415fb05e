"""Packages that look at weights alone: HQQ, optimum-quanto, torchao, bitsandbytes."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..peer import Peer, Task, set_weight


def run_hqq(task: Task) -> Any:
    import torch
    from hqq.core.quantize import Quantizer

    for _, linear in task.linears():
        codes, meta = Quantizer.quantize(
            linear.weight.data, task.bits, group_size=task.group_size, axis=1, device="cpu", compute_dtype=torch.float32
        )
        set_weight(linear, Quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32}))
    return task.model


def run_quanto(task: Task) -> Any:
    from optimum.quanto import MaxOptimizer, qint2, qint4, quantize_weight

    qtype = {2: qint2, 4: qint4}[task.bits]
    for _, linear in task.linears():
        scale, shift = MaxOptimizer()(linear.weight.data, qtype, 0, task.group_size)
        quantized = quantize_weight(linear.weight.data, qtype, 0, scale, shift, task.group_size)
        set_weight(linear, quantized.dequantize())
    return task.model


def run_torchao(task: Task, ranges: str) -> Any:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{task.bits}"),
        granularity=PerGroup(task.group_size),
        mapping_type=MappingType.ASYMMETRIC,
        intx_choose_qparams_algorithm=ranges,
    )
    names = {name for name, _ in task.linears()}
    quantize_(task.model, config, filter_fn=lambda module, name: name in names)
    for _, linear in task.linears():
        weight: Any = linear.weight
        set_weight(linear, weight.dequantize())
    return task.model


def run_bitsandbytes(task: Task, kind: str) -> Any:
    from bitsandbytes import functional

    for _, linear in task.linears():
        # Blocks run along rows, so that a block is a group where rows are a multiple of it.
        codes, state = functional.quantize_4bit(linear.weight.data, blocksize=task.group_size, quant_type=kind)
        set_weight(linear, functional.dequantize_4bit(codes, state))
    return task.model


PEERS = [
    Peer("HQQ", run_hqq, "hqq", "groups along rows (axis 1), its defaults", calibrated=False, bits=(2, 3, 4, 8)),
    Peer(
        "quanto", run_quanto, "optimum-quanto", "qint2 and qint4, largest and smallest", calibrated=False, bits=(2, 4)
    ),
    Peer("torchao intx", partial(run_torchao, ranges="affine"), "torchao", "weights only, affine", calibrated=False),
    Peer(
        "torchao intx, HQQ scales",
        partial(run_torchao, ranges="hqq_scale_only"),
        "torchao",
        "weights only, hqq_scale_only",
        calibrated=False,
    ),
    Peer(
        "bitsandbytes NF4",
        partial(run_bitsandbytes, kind="nf4"),
        "bitsandbytes",
        "nf4, a symmetric table",
        calibrated=False,
        bits=(4,),
    ),
]
