"""What trained routers see of a token."""

import torch
from torch import Tensor


def token_features(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Features that trained routers see of tokens: each RMS-normalised, with the logarithm of its RMS appended.

    The error that a slice leaves grows with the norm of the token, so a router that loses the norm loses its best feature.

    Args:
        x: (..., I) tokens.
        dtype: dtype of the router's weights.

    Returns:
        (..., I + 1) features in that dtype.
    """
    x = x.to(dtype)
    rms = root_mean_square(x)
    return torch.cat([x / rms, rms.log()], dim=-1)


def root_mean_square(x: Tensor) -> Tensor:
    """Root mean square (..., 1) of each token (..., I), above zero."""
    return x.square().mean(-1, keepdim=True).add(1e-12).sqrt()
