"""Match the output of the full-precision block, at fixed depths and routed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mobiq_lightning.strategies.base import BlockRun, Objective
from mobiq_lightning.strategies.numbers import in_range


class BlockReconstruction(Objective):
    """Relative squared error of the block's output, at fixed depths and with the gates of the routers.

    The fixed depths keep every precision usable: no finer slice brings back what the base slice's range clips, so a
    range that is trained for the base alone ruins the depths above it.

    Args:
        depth_weights: Weight of the error at each fixed depth, by its bits. A stage that names a depth trains that
            depth alone; a stage that trains routers alone trains no fixed depth.
        routed_weight: Weight of the routed block's error.
        budget_rule: How the routed block meets its budget. ``quantile`` takes each step's thresholds from the scores, so
            that the average is the budget exactly. ``penalty`` keeps the thresholds at 0 and adds the squared distance of
            the average bits to the budget to the loss (arXiv 2602.20191).
        penalty_weight: Weight of that squared distance, in loss per squared bit.
        auxiliary_weight: Weight of a second target for every fixed depth: the full-precision block on the quantized
            inputs (OmniQuant's auxiliary loss, which its 2-bit settings need).

    Example:
        ``objective: {class_path: BlockReconstruction, init_args: {depth_weights: {2: 1.0, 4: 0.3, 8: 0.1}}}``
    """

    def __init__(
        self,
        depth_weights: dict[int, float] | None = None,
        routed_weight: float = 1.0,
        budget_rule: Literal["quantile", "penalty"] = "quantile",
        penalty_weight: float = 1.0,
        auxiliary_weight: float = 0.0,
    ) -> None:
        self.depth_weights = dict(depth_weights) if depth_weights is not None else {2: 1.0, 4: 0.3, 8: 0.1}
        weights = {f"depth_weights[{depth}]": weight for depth, weight in self.depth_weights.items()}
        weights |= {
            "routed_weight": routed_weight,
            "penalty_weight": penalty_weight,
            "auxiliary_weight": auxiliary_weight,
        }
        for name, weight in weights.items():
            in_range(name, weight, 0)
        self.routed_weight = routed_weight
        self.budget_rule = budget_rule
        self.penalty_weight = penalty_weight
        self.auxiliary_weight = auxiliary_weight

    @property
    def depths(self) -> tuple[int, ...]:
        """Fixed depths in bits, ascending."""
        return tuple(sorted(depth for depth, weight in self.depth_weights.items() if weight > 0))

    def __call__(self, run: BlockRun, target_bits: float, train_routers: bool) -> dict[str, Tensor]:
        """Computes the loss on one batch, with relative errors at fixed depths and, if routers are trained, routed.

        Args:
            run: The block on this batch.
            target_bits: Budget asked for at this step, in average bits per weight.
            train_routers: Whether this stage trains routers; if not, only the fixed depths count.

        Returns:
            Scalar tensors by name: ``loss``, ``error_<depth>_bits``, ``error_routed`` and ``routed_bits``.
        """
        terms: dict[str, Tensor] = {}
        loss = run.target.new_zeros((), dtype=torch.float32)
        weights = {depth: self.depth_weights[depth] for depth in self.depths} if run.depths is None else run.depths
        for depth, weight in weights.items():
            output = run.at_depth(depth)
            error = relative_error(output, run.target)
            terms[f"error_{depth}_bits"] = error
            loss = loss + weight * error
            if self.auxiliary_weight > 0:
                auxiliary = relative_error(output, run.auxiliary_target(depth))
                loss = loss + weight * self.auxiliary_weight * auxiliary
        if train_routers:
            output, bits = run.routed(target_bits, self.budget_rule == "quantile")
            terms["error_routed"] = relative_error(output, run.target)
            terms["routed_bits"] = bits
            loss = loss + self.routed_weight * terms["error_routed"]
            if self.budget_rule == "penalty":
                loss = loss + self.penalty_weight * (bits - target_bits) ** 2
        return {"loss": loss, **terms}


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ``|output - target|^2 / |target|^2``, a float32 scalar.

    The error is relative to each token, since the norm in front of whatever reads the output takes the token's scale
    away. Relative to the whole batch, a few tokens with huge norms (attention sinks) would be all that counts, and
    routers would serve them alone.

    Args:
        output: (..., H) output of the block.
        target: (..., H) output that it is to match.
    """
    target = target.float()
    return ((output.float() - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean()
