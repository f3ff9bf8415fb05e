"""Slice schemes: how a weight is cut into slices."""

from mobiq_lightning.strategies.slices.binary_coded import BinaryCodedSlices
from mobiq_lightning.strategies.slices.independent import IndependentResidualSlices
from mobiq_lightning.strategies.slices.kmeans import KMeansSlices
from mobiq_lightning.strategies.slices.progressive import ProgressiveSlices
from mobiq_lightning.strategies.slices.residual import ResidualSlices

__all__ = ["BinaryCodedSlices", "IndependentResidualSlices", "KMeansSlices", "ProgressiveSlices", "ResidualSlices"]
