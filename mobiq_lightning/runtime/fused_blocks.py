"""Norms and gated MLPs of LLaMA-family blocks that enter the kernels together with the router of what they feed.

The modules keep their place, name and parameters; for a few tokens at a time, their class computes its output in the launch
that routes and prepares it. For all other inputs they compute what they did before.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from mobiq_lightning.nn import Borrowed, ElasticLinear
from mobiq_lightning.runtime.kernel_input import KernelInput

BLOCKS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Decoder layers whose norms are RMS norms of the form ``weight * (x / rms).to(dtype)``, and whose MLP is
``down(act(gate(x)) * up(x))``."""


class FusedNorm:
    """Mixin for the class of an RMS norm: a few tokens are normalised in the kernel launch that routes them."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalises tokens (..., I) to (..., I), in the launch that routes them where the kernels can."""
        kernel, norm = _current(self), _module(self)
        if kernel is not None and kernel.routes(hidden_states) and norm.weight.dtype == hidden_states.dtype:
            return kernel.enter(hidden_states, norm=(norm.weight, norm.variance_epsilon))
        return super().forward(hidden_states)  # type: ignore[misc,no-any-return]


class FusedMLP:
    """Mixin for the class of a gated MLP: a few tokens are gated in the kernel launch that routes them."""

    def forward(self, x: Tensor) -> Tensor:
        """Applies ``down(act(gate(x)) * up(x))`` to tokens (..., H), gated in the launch that routes them: (..., H)."""
        kernel, mlp = _current(self), _module(self)
        if kernel is None or not kernel.routes(x):
            return super().forward(x)  # type: ignore[misc,no-any-return]
        y: Tensor = mlp.down_proj(kernel.enter(mlp.gate_proj(x), up=mlp.up_proj(x)))
        return y


def fuse_blocks(model: nn.Module) -> None:
    """Lets norms and MLPs enter the kernels, in blocks of the known kinds whose linears are elastic.

    Args:
        model: Model whose norms and MLPs are changed in place; while no kernels are attached they compute as before.
    """
    for block in model.modules():
        if type(block).__name__ not in BLOCKS:
            continue
        part: Any = block
        feeds = (
            (part.input_layernorm, part.self_attn.q_proj, FusedNorm),
            (part.post_attention_layernorm, part.mlp.gate_proj, FusedNorm),
            (part.mlp, part.mlp.down_proj, FusedMLP),
        )
        for module, linear, mixin in feeds:
            known = mixin is FusedNorm or part.mlp.config.hidden_act in ("silu", "swish")
            if known and isinstance(linear, ElasticLinear) and not isinstance(module, (FusedNorm, FusedMLP)):
                kind: Any = type(module)
                module.__class__ = _fused(kind, mixin)
                module.feeds = Borrowed(linear)


@functools.cache
def _fused(cls: Any, mixin: Any) -> Any:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": _reduce}
    return type(cls.__name__, (mixin, cls), {**names, "plain_class": cls, "mixin": mixin})


def _reduce(module: Any, protocol: Any) -> Any:
    """Pickles as its own class and mixin, since the class that joins them is made at run time."""
    return (_rebuild, (module.plain_class, module.mixin), *nn.Module.__reduce_ex__(module, 2)[2:])


def _rebuild(cls: type, mixin: type) -> Any:
    fused = _fused(cls, mixin)
    return fused.__new__(fused)


def _current(module: Any) -> KernelInput | None:
    kernel: KernelInput | None = module.feeds.value.routed.kernel
    return kernel


def _module(module: Any) -> Any:
    """Gives `module` itself, of any type for the type checker: a mixin does not know what it is mixed into."""
    return module
