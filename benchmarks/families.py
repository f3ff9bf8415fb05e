# python -m benchmarks.families [--to benchmarks/results/families.json] [--table]
"""Tries families of models: tiny random ones of transformers' own configurations, called block by block and taken apart.

Each is exact, if its logits are those of the model itself, or refused, with the reason. What is sliced is counted at the
shapes of the default configuration of the family, on blocks of each kind.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mobiq_lightning.calibration.block_caller import BlockCaller
from mobiq_lightning.calibration.block_check import check_blocks
from mobiq_lightning.calibration.planning.random_model import blocks_of_each_kind, random_model
from mobiq_lightning.errors import ModelError
from mobiq_lightning.nn import BlockLayout, experts_of

ROWS = Path(__file__).parent / "results" / "families.json"
EXACT, REFUSED = "exact", "refused"
ROUNDINGS = 32
"""Roundings of the largest logit, in float32, up to which logits are called exact: opened experts add up in another order."""
_BASE: dict[str, Any] = {
    "vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
_MIXED: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
_PER_LAYER: dict[str, Any] = {
    **_MIXED, "vocab_size_per_layer_input": 304, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
    "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0],
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        name: Name for readers.
        config: Class of its configuration in transformers, without ``Config``.
        extra: Values of that configuration beside those of all families, at the size of the tiny model.
        usual: Values of the default configuration that are changed, so that few blocks have all kinds.
    """

    name: str
    config: str
    extra: dict[str, Any] = field(default_factory=dict)
    usual: dict[str, Any] = field(default_factory=dict)

    def tiny(self) -> Any:
        """A random model with two blocks, frozen; no random state is changed."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = random_model(self.configuration(), range(2), torch.device("cpu"))
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.2)
                elif name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.1)
        return model

    def configuration(self, **values: Any) -> Any:
        """The configuration of the tiny model."""
        import transformers

        return getattr(transformers, f"{self.config}Config")(**{**_BASE, **self.extra, **values})

    def of_usual_shapes(self) -> Any:
        """A model without weights, of the default configuration of transformers with a block of each kind."""
        import transformers

        config = getattr(transformers, f"{self.config}Config")(**self.usual)
        with torch.device("meta"):
            return random_model(config, blocks_of_each_kind(config), torch.device("meta"))


FAMILIES = [
    Family("Llama 2", "Llama"),
    Family("Llama 3", "Llama", {"rope_parameters": _LLAMA3}),
    Family(
        "Llama 4 (text)",
        "Llama4Text",
        {
            "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": 8,
            "interleave_moe_layer_step": 2,
        },
    ),
    Family("Mistral, window in all blocks", "Mistral", {"sliding_window": 8}),
    Family("Qwen2, Qwen2.5", "Qwen2"),
    Family("Qwen2, windows in some blocks", "Qwen2", _WINDOW),
    Family("Qwen3", "Qwen3"),
    Family("Qwen3, windows in some blocks", "Qwen3", _WINDOW),
    Family("Gemma 2", "Gemma2", _MIXED),
    Family("Gemma 3 (text)", "Gemma3Text", _MIXED),
    Family("Gemma 3n (text)", "Gemma3nText", _PER_LAYER),
    Family("Phi-3", "Phi3", {"sliding_window": None}),
    Family("Granite", "Granite"),
    Family("GLM", "Glm"),
    Family("GLM 4", "Glm4"),
    Family("OLMo 2", "Olmo2"),
    Family("OLMo 3", "Olmo3", _MIXED),
    Family("SmolLM3", "SmolLM3"),
    Family("Cohere 2", "Cohere2", _MIXED),
    Family("EXAONE 4", "Exaone4", _MIXED),
    Family("StableLM", "StableLm"),
    Family("StarCoder2", "Starcoder2", {"sliding_window": None}),
    Family("GPT-NeoX", "GPTNeoX"),
    Family("GPT-2", "GPT2"),
    Family("BLOOM", "Bloom"),
    Family("XGLM", "XGLM"),
    Family("OPT", "OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Family("Mamba", "Mamba"),
    Family("Jamba", "Jamba", {**_EXPERTS, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1}),
    Family("Mixtral", "Mixtral", {**_LOCAL, "sliding_window": None}),
    Family("Qwen2-MoE", "Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 24}),
    Family("Qwen3-MoE", "Qwen3Moe", _EXPERTS),
    Family("OLMoE", "Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Family("DeepSeek-V3", "DeepseekV3", _LATENT, {"first_k_dense_replace": 1}),
    Family("GPT-OSS", "GptOss", {**_LOCAL, **_MIXED}),
]  # fmt: skip


@torch.no_grad()
def difference_of_logits(model: Any) -> tuple[float, float]:
    """By how much logits differ that blocks give one at a time, after experts were opened, and the largest logit.

    Args:
        model: A causal language model, which is opened.

    Raises:
        ModelError: If its blocks cannot be called one at a time, or not be sliced.
    """
    ids = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(1))
    expected, layout = model(input_ids=ids, use_cache=False).logits, BlockLayout()
    layout.open(model)
    blocks = list(layout.find(model))
    for block in blocks:
        layout.group_linears(block, "input")
    check_blocks(model, blocks, layout)
    caller = BlockCaller(model, blocks, torch.device("cpu"))
    hidden = caller.embed_all(ids)
    for index in range(len(blocks)):
        hidden = caller.call(index, hidden)
    with caller.after_blocks() as logits_of:
        found = logits_of(ids, hidden)
    return float((found - expected).abs().max()), float(expected.abs().max())


def row_of(family: Family) -> dict[str, Any]:
    """What becomes of a family."""
    try:
        difference, largest = difference_of_logits(family.tiny())
    except ModelError as error:
        return {"family": family.name, "result": REFUSED, "reason": str(error).removeprefix("model.pretrained: ")}
    model, layout = family.of_usual_shapes(), BlockLayout()
    layout.open(model)
    blocks = list(layout.find(model))
    routed: dict[str, None] = {}
    kept: dict[str, int] = {}
    for block in blocks:
        for names in layout.group_linears(block, "input"):
            experts = experts_of(block, names[0])
            routed["experts" if experts else "+".join(name.rpartition(".")[2] for name in names)] = None
        for name, matrix in layout.kept(block).items():
            kept[name] = kept.get(name, 0) + matrix.numel()
    total = sum(p.numel() for block in blocks for p in block.parameters())
    sliced = sum(
        block.get_submodule(name).weight.numel()  # type: ignore[union-attr,operator]
        for block in blocks
        for names in layout.group_linears(block, "input")
        for name in names
    )
    return {
        "family": family.name,
        "result": EXACT if difference <= ROUNDINGS * torch.finfo(torch.float32).eps * largest else "differs",
        "difference": difference,
        "largest": largest,
        "blocks": layout.blocks,
        "sliced_share": sliced / total,
        "routed": list(routed),
        "kept": {name: count / total for name, count in kept.items()},
    }


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of a row of the table in the documentation."""
    if row["result"] == REFUSED:
        return [row["family"], REFUSED, "", row["reason"].split(":")[0].split(";")[0]]
    kept = ", ".join(f"`{name.removesuffix('.weight')}`" for name in row["kept"])
    routed = ", ".join(f"`{name}`" for name in row["routed"]) + (f"; in full precision: {kept}" if kept else "")
    return [row["family"], row["result"], f"{row['sliced_share']:.2%}", routed]


def main() -> None:
    """Tries all families and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=ROWS, help="where the rows go")
    parser.add_argument("--table", action="store_true", help="print the table of docs/families.md, too")
    given = parser.parse_args()
    rows = [row_of(family) for family in FAMILIES]
    import transformers

    found = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}, "rows": rows}
    given.to.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for row in rows if given.table else []:
        print(f"| {' | '.join(cells(row))} |")


if __name__ == "__main__":
    main()
