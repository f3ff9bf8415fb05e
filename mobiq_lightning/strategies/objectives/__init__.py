"""Objectives: what a block, or the whole model, is trained to match."""

from mobiq_lightning.strategies.objectives.block_reconstruction import BlockReconstruction
from mobiq_lightning.strategies.objectives.logit_distillation import LogitDistillation

__all__ = ["BlockReconstruction", "LogitDistillation"]
