"""Who reads and who writes the residual stream of a model, and whether that is all there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mobiq_lightning.errors import ModelError

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Norms of a block, each with the linears that read its output."""
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""Linears of a block whose output is added to the residual stream."""
_INSIDE = ("self_attn.q_norm", "self_attn.k_norm")  # norms that the stream does not go through
_NORM_TOLERANCE = 0.05  # relative; the error of other norms is of the order of 1, that of half precision 0.01
_SHOWN = 4


class ResidualStream:
    """The parts of a causal language model that read and write its residual stream.

    Args:
        model: The causal language model, of transformers.
        blocks: Decoder blocks of the model.

    Raises:
        ModelError: If the model has parts that a rotation of the stream would not pass: other norms than RMS norms of the
            form ``weight * x / rms(x)``, or parameters beside those of a LLaMA block, with or without biases.
    """

    def __init__(self, model: Any, blocks: nn.ModuleList) -> None:
        self.embedding: Any = model.get_input_embeddings()
        self.head: Any = model.get_output_embeddings()
        decoder: Any = next(m for m in model.modules() if any(child is blocks for child in m.children()))
        self.final_norm: Any = getattr(decoder, "norm", None)
        problems = list(self._problems(model, blocks))
        if problems:
            more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise ModelError(
                f"model.transform: the residual stream of {type(model).__name__} cannot be rotated without changing what "
                f"the model computes: {'; '.join(problems[:_SHOWN])}{more}. Blocks like LLaMA's are covered; take another "
                "transform, or none"
            )
        self.width: int = self.embedding.embedding_dim

    def _problems(self, model: Any, blocks: nn.ModuleList) -> Iterator[str]:
        """One phrase for each part of the model that is missing or not covered."""
        parts = {"input embedding": self.embedding, "output head": self.head, "final norm": self.final_norm}
        missing = [f"no {name}" for name, module in parts.items() if module is None]
        if missing:
            yield from missing
            return
        known = {id(p) for p in (self.embedding.weight, self.head.weight, getattr(self.head, "bias", None))}
        known |= {id(p) for p in self.final_norm.parameters()}
        known |= {id(p) for block in blocks for p in block.parameters()}  # looked at below
        yield from (name for name, p in model.named_parameters() if id(p) not in known)
        yield from _norm_problem("the final norm", self.final_norm)
        for number, block in enumerate(blocks):
            yield from (f"block {number + 1}: {problem}" for problem in _block_problems(block))


def _block_problems(block: nn.Module) -> Iterator[str]:
    linears = [*(name for readers in READERS.values() for name in readers), *WRITERS]
    required = {*(f"{name}.weight" for name in linears), *(f"{name}.weight" for name in READERS)}
    known = required | {f"{name}.bias" for name in linears} | {f"{name}.weight" for name in _INSIDE}
    found = {name for name, _ in block.named_parameters()}
    yield from (f"no {name}" for name in sorted(required - found))
    yield from sorted(found - known)
    if required <= found:
        for name in READERS:
            yield from _norm_problem(name, block.get_submodule(name))


def _norm_problem(name: str, norm: Any) -> Iterator[str]:
    """One phrase if a norm does not compute ``weight * x / rms(x)``, as norms with a mean do not."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        yield f"{name} ({type(norm).__name__}) has no weight"
        return
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)) + 1
    expected = weight.float() * x / x.square().mean(-1, keepdim=True).sqrt()
    error = float((norm(x.to(weight.dtype)).float() - expected).norm() / expected.norm())
    if not error <= _NORM_TOLERANCE:
        yield f"{name} ({type(norm).__name__}) is no RMS norm (relative difference {error:.2g})"
