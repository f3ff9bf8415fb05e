"""Not deployable: the exact error of every token, an upper bound for what a local router can know."""

from __future__ import annotations

import torch
from torch import Tensor

from mobiq_lightning.errors import RecipeError
from mobiq_lightning.strategies.routers.local_error import LocalErrorRouter


class OracleRouter(LocalErrorRouter):
    """Knows the squared error ``|(W - W_k) x|^2`` of every token at k slices exactly; NOT deployable.

    It is an upper bound for routers that see one layer's input.

    It stores, for every slice, the square root of the Gram matrix of the error: S x I x I numbers, more than the weights
    themselves, and multiplies by all of them. The all-in bits of a comparison count them. What it bounds is the error of
    single layers; an allocation that knows what later layers make of an error can be better.

    Args:
        in_features: Features of the routed input, I.
        n_slices: Number of slices, S.
        max_features: Widest input that is accepted; the factors of wider ones would not fit into memory.

    Raises:
        RecipeError: If the input is wider than `max_features`.

    Example:
        ``router: {class_path: OracleRouter, init_args: {max_features: 4096}}``
    """

    deployable = False

    def __init__(self, in_features: int, n_slices: int, max_features: int = 4096) -> None:
        if in_features > max_features:
            gigabytes = 4 * n_slices * in_features**2 / 1e9
            raise RecipeError(
                f"model.router: OracleRouter would store {gigabytes:.1f} GB for one input of {in_features} features; it is "
                "an upper bound for small models. Use ErrorSketchRouter, or raise max_features"
            )
        super().__init__(in_features, n_slices, in_features)

    def factor(self, errors: Tensor) -> Tensor:
        """Square roots (S, I, I) of the Gram matrices of the errors ``W - W_k`` (S, O, I), from their eigenvectors."""
        errors = errors.double()
        values, vectors = torch.linalg.eigh(errors.transpose(1, 2) @ errors)
        factors: Tensor = (values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.transpose(1, 2)).float()
        return factors
