"""Objectives: what a block is trained to match."""

from mobiq_lightning.strategies.objectives.block_reconstruction import BlockReconstruction

__all__ = ["BlockReconstruction"]
