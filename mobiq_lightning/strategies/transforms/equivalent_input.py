"""The learned scale and shift of one input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mobiq_lightning.strategies.transform_base import InputTransform

_SMALLEST = 1e-5  # of magnitudes: channels that are always 0 get a scale like any other


class EquivalentInput(InputTransform):
    """Learns a scale, by its logarithm so that it stays above 0, and perhaps a shift of every channel.

    Args:
        in_features: Channels of the input, I.
        shift: Whether channels are shifted.
        alpha: Balance in [0, 1] with which the scales begin: 0 evens out the weights alone, 1 the inputs alone.
    """

    def __init__(self, in_features: int, shift: bool, alpha: float) -> None:
        super().__init__(in_features)
        self.alpha = alpha
        self.log_scale = nn.Parameter(torch.zeros(in_features))
        self.centre = nn.Parameter(torch.zeros(in_features)) if shift else None

    def channel_scale(self) -> Tensor:
        """Learned scale s of each channel, (I,) float32, above 0."""
        return self.log_scale.exp()

    def channel_shift(self) -> Tensor | None:
        """Learned shift d of each channel, (I,) float32; None if channels are not shifted."""
        return self.centre

    @torch.no_grad()
    def initialize(self, x: Tensor, weights: Sequence[Tensor]) -> None:
        """Sets shift and scale of each channel to their initial values, from tokens and weights.

        The shift begins at the channel's mean: the error of a product is that of the weight times ``(x - d) / s``, and
        the mean is the d that makes it smallest. Scales begin as in SmoothQuant (arXiv 2211.10438), with a geometric
        mean of 1.

        Args:
            x: (N, I) tokens of this input in the full-precision block.
            weights: (O, I) of each linear that reads the input.
        """
        x = x.float()
        if self.centre is not None:
            self.centre.copy_(x.mean(0))
            x = x - self.centre
        in_inputs = x.abs().amax(0).clamp_min(_SMALLEST).log()
        in_weights = (
            torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0).clamp_min(_SMALLEST).log()
        )
        log_scale = self.alpha * in_inputs - (1 - self.alpha) * in_weights
        self.log_scale.copy_(log_scale - log_scale.mean())
