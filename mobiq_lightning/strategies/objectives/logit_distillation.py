"""Match the next-token distributions of the full-precision model, at fixed depths and routed."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mobiq_lightning.strategies.base import BlockRun, Objective
from mobiq_lightning.strategies.numbers import in_range


class LogitDistillation(Objective):
    """KL divergence from the full-precision model's next-token distribution, for stages that train the whole model.

    Args:
        depth_weights: Weight of the divergence at each fixed depth, by its bits, in stages that name no depth.
        routed_weight: Weight of the routed model's divergence. Its budget is met by one threshold for all inputs.
        label_weight: Weight of the text itself beside the model, in [0, 1): the target is the model's distribution
            times ``1 - label_weight`` plus the token that follows times ``label_weight``. Above 0 this fine-tunes on
            the calibration
            text: perplexity on such text may fall below that of full precision, while the divergence from it grows.

    Example:
        ``model_objective: {class_path: LogitDistillation, init_args: {label_weight: 0.0}}``
    """

    def __init__(
        self, depth_weights: dict[int, float] | None = None, routed_weight: float = 1.0, label_weight: float = 0.0
    ) -> None:
        self.depth_weights = dict(depth_weights) if depth_weights is not None else {}
        weights = {f"depth_weights[{depth}]": weight for depth, weight in self.depth_weights.items()}
        for name, weight in {**weights, "routed_weight": routed_weight}.items():
            in_range(name, weight, 0)
        in_range("label_weight", label_weight, 0, 1)
        self.routed_weight, self.label_weight = routed_weight, label_weight

    @property
    def depths(self) -> tuple[int, ...]:
        """Fixed depths in bits, ascending."""
        return tuple(sorted(depth for depth, weight in self.depth_weights.items() if weight > 0))

    def __call__(self, run: BlockRun, target_bits: float, train_routers: bool) -> dict[str, Tensor]:
        """Computes the loss on one batch, with divergences at fixed depths and, if routers are trained, routed.

        Args:
            run: The whole model on this batch; its outputs are logits (B, T, V).
            target_bits: Budget asked for at this step, in average bits per weight.
            train_routers: Whether this stage trains routers; if not, only the fixed depths count.

        Returns:
            Scalar tensors by name: ``loss``, ``kl_<depth>_bits``, ``kl_routed`` and ``routed_bits``.
        """
        reference = F.log_softmax(run.target.float(), dim=-1)
        terms: dict[str, Tensor] = {}
        loss = reference.new_zeros(())
        weights = {depth: self.depth_weights[depth] for depth in self.depths} if run.depths is None else run.depths
        for depth, weight in weights.items():
            logits = run.at_depth(depth)
            terms[f"kl_{depth}_bits"] = divergence(logits, reference)
            loss = loss + weight * self._distance(terms[f"kl_{depth}_bits"], logits, run)
        if train_routers:
            logits, bits = run.routed(target_bits, True)
            terms["kl_routed"], terms["routed_bits"] = divergence(logits, reference), bits
            loss = loss + self.routed_weight * self._distance(terms["kl_routed"], logits, run)
        return {"loss": loss, **terms}

    def _distance(self, kl: Tensor, logits: Tensor, run: BlockRun) -> Tensor:
        if not self.label_weight or run.input_ids is None:
            return kl
        nll = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), run.input_ids[:, 1:].flatten())
        return (1 - self.label_weight) * kl + self.label_weight * nll


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Mean over tokens of ``KL(reference || model)`` in nats, a float32 scalar.

    Args:
        logits: (B, T, V) logits of the model, any dtype.
        reference: (B, T, V) log-probabilities of the reference, float32.
    """
    return divergences_of_tokens(logits, reference).mean()


def divergences_of_tokens(logits: Tensor, reference: Tensor) -> Tensor:
    """``KL(reference || model)`` of each token (B, T) in nats, float32.

    Args:
        logits: (B, T, V) logits of the model, any dtype.
        reference: (B, T, V) log-probabilities of the reference, float32.
    """
    log_probs = F.log_softmax(logits.float(), dim=-1)
    return (reference.exp() * (reference - log_probs)).sum(-1)
