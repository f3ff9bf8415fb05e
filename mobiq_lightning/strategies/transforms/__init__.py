"""Transforms: how weights and inputs are changed before weights are sliced."""

from mobiq_lightning.strategies.transforms.hadamard import HadamardRotation
from mobiq_lightning.strategies.transforms.identity import NoTransform
from mobiq_lightning.strategies.transforms.learnable_equivalent import LearnableEquivalentTransform

__all__ = ["HadamardRotation", "LearnableEquivalentTransform", "NoTransform"]
