"""Measures the tokens per second of a whole model with random weights, plain and sliced, decoded in the same way."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from mobiq_lightning.errors import KernelError
from mobiq_lightning.latency.journal import Candidate, Journal
from mobiq_lightning.latency.reference_products import random_slices
from mobiq_lightning.latency.shapes import GROUP_SIZE, SLICE_BITS, Shape
from mobiq_lightning.latency.timing import summary
from mobiq_lightning.nn import ElasticLinear
from mobiq_lightning.serving import random_prompt, seconds_per_step

BUDGETS = (2.0, 4.0, 8.0)
_ROUTER = {"class_path": "mobiq_lightning.strategies.MLPRouter", "init_args": {"hidden_features": 16}}


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a LLaMA that is timed, and how many tokens it decodes.

    Args:
        name: Name of the model.
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        layers: Number of decoder blocks.
        heads: Number of attention heads, all with keys and values of their own.
        vocabulary: Number of token ids.
        prompt: Number of tokens before the first that is timed.
        steps: Number of tokens that are timed together.
        repeats: Number of times that so many tokens are timed.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    prompt: int
    steps: int
    repeats: int


SIZES = {
    "cuda": ModelSize("llama-2-7b", 4096, 11008, 32, 32, 32000, 128, 64, 5),
    "cpu": ModelSize("four small blocks", 512, 1408, 4, 8, 2048, 16, 8, 3),
}
SECONDS_NEEDED = {"cuda": 60.0, "cpu": 3.0}
"""Seconds that must be left before the deadline for this section to be begun, by type of device."""


def model(journal: Journal, dtype: torch.dtype, size: ModelSize | None = None) -> None:
    """Times a plain model with random weights, then slices its linears and times it at every budget of `BUDGETS`.

    Embeddings and the head are not sliced. Both models are decoded greedily, batch 1, a static cache, one `GraphedStep`.

    Args:
        journal: Journal that takes the rows.
        dtype: dtype of the plain weights.
        size: Sizes of the model; by default those of LLaMA-2-7B on CUDA, and small ones on a CPU.

    Raises:
        KernelError: If the kernels were to be timed, but the model does not run on them.
    """
    device = journal.clock.device
    size = size or SIZES[device.type]
    if journal.seconds_left < SECONDS_NEEDED[device.type]:
        journal.not_measured.append(f"model {size.name} (out of time)")
        journal.save()
        return
    journal.put("model", {**vars(size), "dtype": str(dtype).removeprefix("torch.")})
    network = plain_model(size, device, dtype)
    linears = sum(p.numel() for p in network.model.layers.parameters() if p.ndim == 2)
    head = network.lm_head.weight.nbytes
    _measure(journal, network, size, "plain", 8.0 * dtype.itemsize, linears * dtype.itemsize + head)
    cut(network)
    if journal.path == "kernels" and network.path != "kernels":
        raise KernelError(f"the kernels were to be timed, but the model runs on the {network.path}")
    for bits in BUDGETS:
        if journal.seconds_left <= 0:
            journal.not_measured.append(f"model {size.name} at {bits:g} bits (out of time)")
            continue
        codes = linears * (bits / 8 if journal.path == "kernels" else dtype.itemsize)
        overhead = 4 * linears // GROUP_SIZE if journal.path == "kernels" else 0
        with network.bits(bits):
            _measure(journal, network, size, "elastic", bits, int(codes + overhead + head))
        journal.rows[-1]["used_bits"] = network.bits_used().code_bits
        journal.save()


def plain_model(size: ModelSize, device: torch.device, dtype: torch.dtype) -> Any:
    """Makes a LLaMA with random weights, in eval mode, from transformers."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        made: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return made.eval().requires_grad_(False)


def cut(network: Any) -> None:
    """Makes a model elastic in place, with random sliced weights.

    Its routers give every token the same scores, and its thresholds are such that at the budget of a depth all tokens read
    that depth: what a budget costs does not depend on random weights. Routers are computed as always.
    """
    from mobiq_lightning.checkpoint import ElasticFormat, insert_elastic_linears
    from mobiq_lightning.nn import BlockLayout
    from mobiq_lightning.runtime import make_elastic

    device = network.device
    stored = ElasticFormat(
        slice_bits=list(SLICE_BITS), group_size=GROUP_SIZE, router=_ROUTER, layout=asdict(BlockLayout())
    )
    with device:
        insert_elastic_linears(network, stored)
    generator = torch.Generator(device).manual_seed(0)
    for module in network.modules():
        if isinstance(module, ElasticLinear):
            shape = Shape("", "", (module.out_features,), module.in_features)
            packed = random_slices(shape, module.out_features, device, generator)
            for name, tensor in packed.named_tensors.items():
                module.get_buffer(name).copy_(tensor)
            routed = module.routed
            router: Any = routed.router
            router.score.weight.data.zero_()
            router.score.bias.data.copy_(-torch.arange(len(SLICE_BITS) - 1.0))  # a slice less at each whole number
            upper = torch.tensor(routed.depths[1:], device=device)
            thresholds = 0.5 - (routed.budgets.unsqueeze(1) >= upper).sum(1)
            table = thresholds.expand(len(SLICE_BITS), -1)
            routed.set_tables(table, table)
    network.requires_grad_(False)
    make_elastic(network, "layer", 4.0)
    network.eval()


def _measure(journal: Journal, network: Any, size: ModelSize, product: str, bits: float, n_bytes: int) -> None:
    ids = random_prompt(network, 1, size.prompt)
    timing = summary([s * 1e6 for s in seconds_per_step(network, ids, size.steps, size.repeats)])
    figures = journal.figures(Candidate(product, bits, n_bytes, []), timing)
    row = {"section": "model", "path": journal.path, "shape": size.name, "tokens": 1, **figures}
    plain = next((r for r in journal.rows if r["section"] == "model" and r["product"] == "plain"), None)
    beside = {"times_plain": plain["us"] / timing.us} if plain else {}
    journal.add({**row, **beside, "tokens_per_second": 1e6 / timing.us})
