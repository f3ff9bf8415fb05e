"""The parts of the method that can be swapped: one class per file, plain classes without a registry.

A recipe names a class by `class_path`: ours by its short name, anybody's by its dotted path.
"""

from mobiq_lightning.strategies.abilities import ObservesGains, ObservesWeights, TrainableCodes
from mobiq_lightning.strategies.base import BlockRun, BudgetSchedule, Objective, Router, SliceScheme
from mobiq_lightning.strategies.budgets import (
    ConstantBudget,
    CosineBudget,
    ExponentialBudget,
    LinearBudget,
    ListedBudget,
    SampledBudget,
    StepBudget,
)
from mobiq_lightning.strategies.objectives import BlockReconstruction, LogitDistillation
from mobiq_lightning.strategies.routers import (
    ErrorSketchRouter,
    GradientLayerRouter,
    LearnedLayerRouter,
    LinearRouter,
    MLPRouter,
    NormRouter,
    OracleRouter,
    ProbedLayerRouter,
    RandomRouter,
    StaticRouter,
)
from mobiq_lightning.strategies.slices import (
    BinaryCodedSlices,
    IndependentResidualSlices,
    KMeansSlices,
    ProgressiveSlices,
    ResidualSlices,
)
from mobiq_lightning.strategies.thresholds import ThresholdTask
from mobiq_lightning.strategies.transform_base import InputTransform, Transform
from mobiq_lightning.strategies.transforms import HadamardRotation, LearnableEquivalentTransform, NoTransform

__all__ = [
    "BinaryCodedSlices",
    "BlockReconstruction",
    "BlockRun",
    "BudgetSchedule",
    "ConstantBudget",
    "CosineBudget",
    "ErrorSketchRouter",
    "ExponentialBudget",
    "GradientLayerRouter",
    "HadamardRotation",
    "IndependentResidualSlices",
    "InputTransform",
    "KMeansSlices",
    "LearnableEquivalentTransform",
    "LearnedLayerRouter",
    "LinearBudget",
    "LinearRouter",
    "ListedBudget",
    "LogitDistillation",
    "MLPRouter",
    "NoTransform",
    "NormRouter",
    "Objective",
    "ObservesGains",
    "ObservesWeights",
    "OracleRouter",
    "ProbedLayerRouter",
    "ProgressiveSlices",
    "RandomRouter",
    "ResidualSlices",
    "Router",
    "SampledBudget",
    "SliceScheme",
    "StaticRouter",
    "StepBudget",
    "ThresholdTask",
    "TrainableCodes",
    "Transform",
]
