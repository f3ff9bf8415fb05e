"""LET: learned scales and shifts of the channels of every input."""

from __future__ import annotations

from mobiq_lightning.strategies.transform_base import Transform
from mobiq_lightning.strategies.transforms.equivalent_input import EquivalentInput


class LearnableEquivalentTransform(Transform):
    """Every routed input is shifted and scaled per channel, and the weights that read it take the opposite.

    This is OmniQuant's learnable equivalent transformation (arXiv 2308.13137, section 3.3). There it is folded into the
    norms and linears in front; here it is applied to the input when the product is taken, so that every input can have
    one, also behind the MLP's non-linearity, and so that routers see the input without it. It is learned in the stages
    that train `transforms`, at ``model.rates.transforms``.

    Args:
        shift: Whether channels are shifted too; linears then add a bias.
        alpha: Balance of the initial scales between the weights (0) and the inputs (1):
            ``max|x_j|^alpha / max|W_j|^(1 - alpha)`` (SmoothQuant, arXiv 2211.10438).

    Example:
        ``transform: {class_path: LearnableEquivalentTransform, init_args: {shift: true, alpha: 0.5}}``
    """

    def __init__(self, shift: bool = True, alpha: float = 0.5) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"model.transform: alpha ({alpha}) must lie in [0, 1]")
        self.shift, self.alpha = shift, alpha

    def for_input(self, in_features: int) -> EquivalentInput:
        """Makes the learned scale and shift of an input of `in_features` channels."""
        return EquivalentInput(in_features, self.shift, self.alpha)
