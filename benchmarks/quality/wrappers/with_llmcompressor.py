"""GPTQ and AWQ of llm-compressor, whose linears keep dequantized weights until they are saved."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..peer import Peer, Task


def run(task: Task, method: str) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights: Any = QuantizationArgs(
        num_bits=task.bits, type="int", symmetric=False, strategy="group", group_size=task.group_size
    )
    groups = {"linears": QuantizationScheme(targets=["Linear"], weights=weights)}
    common: dict[str, Any] = {"config_groups": groups, "ignore": ["lm_head"]}
    recipe: list[Any] = {
        "plain": lambda: [GPTQModifier(actorder=None, **common)],
        "act-order": lambda: [GPTQModifier(actorder="static", **common)],
        "awq": lambda: [AWQModifier(duo_scaling="both"), QuantizationModifier(**common)],
    }[method]()
    ids = task.calibration.tolist()
    oneshot(
        model=task.model,
        tokenizer=task.source.tokenizer,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
        recipe=recipe,
        max_seq_length=task.calibration.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        batch_size=8,
    )
    return task.model


PEERS = [
    Peer("GPTQ (llmcompressor)", partial(run, method="plain"), "llmcompressor", "plain, no act-order"),
    Peer("GPTQ, act-order", partial(run, method="act-order"), "llmcompressor", "its default: static act-order"),
    Peer("AWQ (llmcompressor)", partial(run, method="awq"), "llmcompressor", "duo scaling both"),
]
