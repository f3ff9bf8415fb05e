"""Experts of a block as linears of their own, in place of the three-dimensional parameters that transformers holds.

Which experts a token goes to is decided by the model's own gate, in full precision. How deep it reads all of their weights
is decided once for the experts of a block, by one routed input that sees the token as the experts are given it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.nn.borrowed import Borrowed
from mobiq_lightning.nn.reading import Routed

FIRST = ("gate_up_proj", "up_proj")
"""Names of the parameter that experts multiply their tokens with first: with a gate, and without one."""
SECOND = "down_proj"
"""Name of the parameter that what they make of that is multiplied with."""


class Expert(nn.Module):
    """The linears of one expert.

    Args:
        name: Name of the linear that tokens are multiplied with first, which gives gate and values side by side.
        first: That linear, (O, H).
        second: Linear (H, I) of what is gated.
    """

    def __init__(self, name: str, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.add_module(name, first)
        self.add_module(SECOND, second)


def first_name(experts: Any) -> str:
    """Name of the first weight of experts of transformers."""
    return FIRST[0] if getattr(experts, "has_gate", True) else FIRST[1]


class RoutedExperts(nn.Module):
    """Experts whose weights are linears, so that they can be sliced; what they compute is what they did before.

    Args:
        experts: Experts of transformers: parameters (E, O, H) and (E, H, I), or transposed, perhaps with biases. They give
            their parameters up; how they gate is still asked of them.
        top_k: Experts that a token goes to.
    """

    def __init__(self, experts: Any, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.entry = nn.Identity()
        """Is given all tokens (N, H), whatever the form in which experts are given them."""
        self.first_name = first = first_name(experts)
        weights = [getattr(experts, name).detach() for name in (first, SECOND)]
        biases = [getattr(experts, f"{name}_bias", None) for name in (first, SECOND)]
        self.n_experts = len(weights[0])
        for number in range(self.n_experts):
            of_expert = [weight[number].T if self.transposed(experts) else weight[number] for weight in weights]
            added = [None if bias is None else bias.detach()[number] for bias in biases]
            self.add_module(str(number), Expert(first, *map(_linear, of_expert, added)))
        for name in [*dict(experts.named_parameters(recurse=False))]:
            delattr(experts, name)
        self._experts = Borrowed(experts)  # without weights: not to be moved, saved or initialised

    def linears(self) -> list[nn.Module]:
        """The linears of all experts, one expert after the other."""
        return [linear for number in range(self.n_experts) for linear in self.get_submodule(str(number)).children()]

    @property
    def kind(self) -> str:
        """Name of the class of transformers that these experts were."""
        return type(self._experts.value).__name__

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sends tokens through their experts and adds up what these give.

        Args:
            hidden_states: (N, H) tokens.
            top_k_index: (N, K) numbers of the experts of each token.
            top_k_weights: (N, K) factors of what they give.

        Returns:
            (N, H).
        """
        gates = self._decided(hidden_states)
        result = torch.zeros_like(hidden_states)
        factors, k = top_k_weights.flatten(), top_k_index.shape[1]
        for number, chosen in self._sorted(top_k_index.flatten()):
            tokens = chosen // k
            output = self._expert(number, hidden_states[tokens], None if gates is None else gates[tokens])
            result.index_add_(0, tokens, (output * factors[chosen, None]).to(result.dtype))
        return result

    def _sorted(self, experts: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Numbers of experts that occur, each with the places where it does, from the experts (n,) at n places."""
        order = experts.argsort(stable=True)
        start = 0
        for number, count in enumerate(torch.bincount(experts, minlength=self.n_experts).tolist()):
            if count and number < self.n_experts:
                yield number, order[start : start + count]
            start += count

    def _expert(self, number: int, x: Tensor, gates: Tensor | None) -> Tensor:
        """What one expert makes of tokens (n, H), whose gates are (n, S): (n, H)."""
        expert: Any = self.get_submodule(str(number))
        first, second = getattr(expert, self.first_name), getattr(expert, SECOND)
        if gates is not None:
            first.routed.take_gates(x, gates)
        y = first(x)
        y = self._gated(y)
        if gates is not None:
            first.routed.take_gates(y, gates)
        result: Tensor = second(y)
        return result

    def _gated(self, y: Tensor) -> Tensor:
        """What the model makes of products (n, O) with the first weight of an expert: (n, I)."""
        experts = self._experts.value
        result: Tensor = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
        return result

    @staticmethod
    def transposed(experts: Any) -> bool:
        """Whether experts of transformers hold their weights the other way round, (H, O) and (I, H)."""
        return bool(experts.is_transposed)

    def _decided(self, x: Tensor) -> Tensor | None:
        """Gates (N, S) of tokens (N, H), which are counted; None while all are read alike, or nothing is sliced."""
        x = self.entry(x)
        linear: Any = getattr(self.get_submodule("0"), self.first_name)
        routed = getattr(linear, "routed", None)
        if routed is None or not isinstance(routed.reading, Routed):
            return None
        gates: Tensor = routed.gates(x)
        if getattr(linear, "carries_input", False):
            routed.count(routed.bits_of(gates).long())
        return gates

    def extra_repr(self) -> str:
        """What `print(module)` shows of these experts."""
        return f"{self.kind}, {self.top_k} of {self.n_experts} for each token"


class ScaledExperts(RoutedExperts):
    """Experts that are given all tokens, each scaled by its factor for them, which is 0 where they are not chosen.

    So Llama 4 calls them. Who is not chosen gives 0, and is not computed here. How deep a token is read is decided from the
    sum of what its experts are given.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor) -> Tensor:
        """Sends tokens through the experts that are chosen for them.

        Args:
            hidden_states: (E * N, H) scaled tokens, for one expert after the other.

        Returns:
            (E * N, H) what each expert makes of them.
        """
        scaled = hidden_states.unflatten(0, (self.n_experts, -1))
        gates = self._decided(scaled.sum(0))
        result = torch.zeros_like(scaled)
        numbers, tokens = scaled.any(-1).nonzero(as_tuple=True)
        for number, chosen in self._sorted(numbers):
            mine = tokens[chosen]
            result[number, mine] = self._expert(number, scaled[number, mine], None if gates is None else gates[mine])
        return result.flatten(0, 1)

    def _gated(self, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, dim=-1)
        result: Tensor = up * self._experts.value.act_fn(gate)
        return result

    @staticmethod
    def transposed(experts: Any) -> bool:
        """Always: weights are (H, O) and (I, H)."""
        return True


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear on the memory of a weight (O, I) and a bias (O,)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
