"""Opens the experts of decoder blocks, so that their weights can be sliced, and tells what of a block is none of that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.errors import ModelError
from mobiq_lightning.nn.experts import SECOND, RoutedExperts, ScaledExperts, first_name

_SCALED = ("Llama4TextExperts",)
"""Classes of experts that are given all tokens, scaled."""
_TOKENS = 4
_ROUNDINGS = 16
"""Roundings of the largest output, in the dtype of the weights, by which opened experts may differ."""


def open_block(block: nn.Module, compare: bool) -> list[str]:
    """Makes linears of the experts of a block, in place.

    Args:
        block: A decoder block.
        compare: Whether the outputs of the first experts that are opened are compared with those of before.

    Returns:
        Names of the modules with experts, whether they were opened now or before.

    Raises:
        ModelError: If experts are of a form that is not known, or give something else once they are opened.
    """
    for name, module in list(block.named_modules()):
        if not _is_known(module):
            continue
        parts: list[Any] = list(block.get_submodule(name.rpartition(".")[0]).modules())
        top_k = next((int(part.top_k) for part in parts if hasattr(part, "top_k")), None)
        if top_k is None:
            raise ModelError(f"{type(module).__name__} at {name}: how many experts a token goes to is not known")
        given = _tokens(module, top_k) if compare and not next(module.parameters()).is_meta else None
        before = None if given is None else _tried(module, given)
        opened = (ScaledExperts if type(module).__name__ in _SCALED else RoutedExperts)(module, top_k)
        if given is not None and before is not None:
            _check(opened, name, before, _tried(opened, given))
        block.set_submodule(name, opened)
    return [name for name, module in block.named_modules() if isinstance(module, RoutedExperts)]


def unknown_stacks(block: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a block that are stacks of matrices, which are not sliced: experts of a form that is not known."""
    for name, parameter in block.named_parameters():
        if parameter.ndim == 3 and min(parameter.shape[1:]) > 1 and not _is_convolution(block, name):
            yield name, parameter


def experts_of(block: nn.Module, linear: str) -> str | None:
    """Name of the experts that a linear of a block belongs to; None if it belongs to none.

    Args:
        block: A decoder block, its experts opened.
        linear: Name of the linear within the block.
    """
    name = linear.rpartition(".")[0].rpartition(".")[0]
    return name if name and isinstance(block.get_submodule(name), RoutedExperts) else None


def read_share(block: nn.Module, linear: str) -> float:
    """The part of the weights of a linear's input that a token reads: of experts, those that it goes to; else all.

    Args:
        block: A decoder block, its experts opened.
        linear: Name of the linear within the block.
    """
    name = experts_of(block, linear)
    if name is None:
        return 1.0
    experts: Any = block.get_submodule(name)
    return float(experts.top_k / experts.n_experts)


def is_gating(block: nn.Module, name: str) -> bool:
    """Whether a linear decides to which experts tokens go, or how much what they give counts: it stays in full precision.

    Args:
        block: A decoder block.
        name: Name of the linear within the block.
    """
    parent, linear = block.get_submodule(name.rpartition(".")[0]), block.get_submodule(name)
    own = isinstance(linear, nn.Linear) and type(linear).forward is not nn.Linear.forward
    return own or any(child == "experts" for child, _ in parent.named_children())


def _is_known(module: Any) -> bool:
    """Whether a module holds experts as transformers declares them: stacks of matrices, with flags that say how."""
    declared = all(hasattr(module, flag) for flag in ("has_gate", "is_transposed", "has_bias"))
    if not declared and type(module).__name__ not in _SCALED:
        return False
    weights = (getattr(module, first_name(module), None), getattr(module, SECOND, None))
    stacks = all(isinstance(stack, nn.Parameter) and stack.ndim == 3 for stack in weights)
    return stacks and not getattr(module, "has_post_expert_norm", False)


def _is_convolution(block: nn.Module, name: str) -> bool:
    return isinstance(block.get_submodule(name.rpartition(".")[0]), (nn.Conv1d, nn.Conv2d))


@torch.no_grad()
def _tokens(experts: Any, top_k: int) -> tuple[Tensor, ...]:
    """Tokens for experts of transformers, with the numbers of their experts and factors where they are called with these."""
    weight = getattr(experts, SECOND)
    transposed = type(experts).__name__ in _SCALED or experts.is_transposed
    width, n_experts = weight.shape[2 if transposed else 1], weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, width, generator=generator).to(weight)
    index = torch.arange(_TOKENS * top_k).remainder(n_experts).view(_TOKENS, top_k).to(weight.device)
    factors = torch.rand(_TOKENS, top_k, generator=generator).to(weight)
    if type(experts).__name__ not in _SCALED:
        return x, index, factors
    return ((x * x.new_zeros(_TOKENS, n_experts).scatter_(1, index, factors).T[..., None]).flatten(0, 1),)


@torch.no_grad()
def _tried(experts: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    """What experts make of some tokens, in float32."""
    result: Tensor = experts(*given)
    return result.float()


def _check(opened: RoutedExperts, name: str, before: Tensor, after: Tensor) -> None:
    largest, difference = float(before.abs().max()), float((after - before).abs().max())
    dtype = next(opened.parameters()).dtype
    if not bool(torch.isfinite(before).all()):
        return  # then the numbers say nothing; where they come from is found as calibration begins
    if not difference <= _ROUNDINGS * torch.finfo(dtype).eps * largest:
        raise ModelError(
            f"{opened.kind} at {name}: taken apart into linears, experts give outputs that differ by up to {difference:.3g} "
            f"from those of before (which reach {largest:.3g}). This family is not supported"
        )
