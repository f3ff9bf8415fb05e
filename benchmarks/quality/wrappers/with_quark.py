"""GPTQ, GPTAQ, Qronos and AWQ of AMD Quark."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..peer import Peer, Task

LINEARS = [
    *(f"self_attn.{name}_proj" for name in "kvqo"),
    *(f"mlp.{name}_proj" for name in ("up", "gate", "down")),
]


def run(task: Task, method: str) -> Any:
    from quark.torch import ModelQuantizer
    from quark.torch.quantization.config import config
    from quark.torch.quantization.config.algo_configs import AWQ_MAP
    from quark.torch.quantization.config.type import Dtype, QSchemeType, RoundType, ScaleType
    from quark.torch.quantization.observer.observer import PerGroupMinMaxObserver
    from torch.utils.data import DataLoader

    weight = config.QTensorConfig(
        # Signed codes and an integer zero give the same grid as unsigned ones; of three bits only these exist.
        dtype={2: Dtype.uint2, 3: Dtype.int3, 4: Dtype.uint4}[task.bits],
        observer_cls=PerGroupMinMaxObserver,
        symmetric=False,
        scale_type=ScaleType.float,
        round_method=RoundType.half_even,
        qscheme=QSchemeType.per_group,
        ch_axis=-1,
        is_dynamic=False,
        group_size=task.group_size,
    )
    if method == "AWQ":
        algorithm: Any = AWQ_MAP["llama"]
    else:
        kind: Any = getattr(config, f"{method}Config")
        algorithm = kind(inside_layer_modules=LINEARS, model_decoder_layers="model.layers")
    recipe = config.QConfig(
        global_quant_config=config.QLayerConfig(weight=weight), exclude=["lm_head"], algo_config=[algorithm]
    )
    loader: Any = DataLoader(task.calibration, batch_size=8)  # type: ignore[arg-type]
    model = ModelQuantizer(recipe).quantize_model(task.model, loader)
    return ModelQuantizer.freeze(model)  # its linears hold dequantized weights


def peer(method: str, setting: str) -> Peer:
    return Peer(f"{method} (quark)", partial(run, method=method), "amd-quark", setting, bits=(2, 3, 4))


PEERS = [
    peer("GPTQ", "its default: act-order, static groups"),
    peer("GPTAQ", "its default: act-order, static groups"),
    peer("Qronos", "its default: act-order, static groups"),
    peer("AWQ", "its layout of LLaMA"),
]
