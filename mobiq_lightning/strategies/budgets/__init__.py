"""Budget schedules: the bits asked for while a block is calibrated."""

from mobiq_lightning.strategies.budgets.constant import ConstantBudget
from mobiq_lightning.strategies.budgets.cosine import CosineBudget
from mobiq_lightning.strategies.budgets.exponential import ExponentialBudget
from mobiq_lightning.strategies.budgets.linear import LinearBudget
from mobiq_lightning.strategies.budgets.listed import ListedBudget
from mobiq_lightning.strategies.budgets.sampled import SampledBudget
from mobiq_lightning.strategies.budgets.step import StepBudget

__all__ = [
    "ConstantBudget",
    "CosineBudget",
    "ExponentialBudget",
    "LinearBudget",
    "ListedBudget",
    "SampledBudget",
    "StepBudget",
]
