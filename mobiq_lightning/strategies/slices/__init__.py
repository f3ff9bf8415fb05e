"""Slice schemes: how a weight is cut into slices."""

from mobiq_lightning.strategies.slices.residual import ResidualSlices

__all__ = ["ResidualSlices"]
