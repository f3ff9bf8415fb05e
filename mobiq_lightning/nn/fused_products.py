"""What may multiply the linears of one input in their place: the kernels, which the layers know by this protocol alone."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor

from mobiq_lightning.packing import PackedSlices

Linear = TypeVar("Linear", contravariant=True)
"""The class of the linears: `ElasticLinear`, which knows this protocol and so cannot be named here."""


class FusedProducts(Protocol[Linear]):
    """Holds the weights of all linears of one input together, and multiplies them at once."""

    def product(self, x: Tensor, linear: Linear) -> Tensor:
        """Multiplies tokens `x` (..., I) by the weight of `linear`, without adding its bias: (..., O)."""

    def packed(self, linear: Linear) -> PackedSlices:
        """Gives the saved form, bit planes with scales and biases, of one of the linears."""

    def release(self) -> None:
        """Gives the planes back to the linears, which then are multiplied by the reference."""

    def forget(self) -> None:
        """Drops what is kept for the last tensor, for when tokens are to be read in another way."""
