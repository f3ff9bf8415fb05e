"""Match the next-token distributions of the full-precision model, at fixed depths and routed."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mobiq_lightning.strategies.base import BlockRun, Objective


class LogitDistillation(Objective):
    """KL divergence from the full-precision model's next-token distribution, for stages that train the whole model.

    Args:
        depth_weights: Weight of the divergence at each fixed depth, by its bits, in stages that name no depth.
        routed_weight: Weight of the routed model's divergence. Its budget is met by one threshold for all inputs.
    """

    def __init__(self, depth_weights: dict[int, float] | None = None, routed_weight: float = 1.0) -> None:
        self.depth_weights = dict(depth_weights) if depth_weights is not None else {}
        self.routed_weight = routed_weight

    @property
    def depths(self) -> tuple[int, ...]:
        """Fixed depths in bits, ascending."""
        return tuple(sorted(depth for depth, weight in self.depth_weights.items() if weight > 0))

    def __call__(self, run: BlockRun, target_bits: float, train_routers: bool) -> dict[str, Tensor]:
        """See `Objective.__call__`; `run` gives logits (B, T, V)."""
        reference = F.log_softmax(run.target.float(), dim=-1)
        terms: dict[str, Tensor] = {}
        loss = reference.new_zeros(())
        weights = {depth: self.depth_weights[depth] for depth in self.depths} if run.depths is None else run.depths
        for depth, weight in weights.items():
            terms[f"kl_{depth}_bits"] = divergence(run.at_depth(depth), reference)
            loss = loss + weight * terms[f"kl_{depth}_bits"]
        if train_routers:
            logits, bits = run.routed(target_bits, True)
            terms["kl_routed"], terms["routed_bits"] = divergence(logits, reference), bits
            loss = loss + self.routed_weight * terms["kl_routed"]
        return {"loss": loss, **terms}


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Mean over tokens of ``KL(reference || model)`` in nats, a float32 scalar.

    Args:
        logits: (B, T, V) of the model, any dtype.
        reference: (B, T, V) log-probabilities, float32.
    """
    log_probs = F.log_softmax(logits.float(), dim=-1)
    return (reference.exp() * (reference - log_probs)).sum(-1).mean()
