"""Routers: which tokens read how many slices."""

from mobiq_lightning.strategies.routers.error_sketch import ErrorSketchRouter
from mobiq_lightning.strategies.routers.gradient_layer import GradientLayerRouter
from mobiq_lightning.strategies.routers.learned_layer import LearnedLayerRouter
from mobiq_lightning.strategies.routers.linear import LinearRouter
from mobiq_lightning.strategies.routers.mlp import MLPRouter
from mobiq_lightning.strategies.routers.norm import NormRouter
from mobiq_lightning.strategies.routers.oracle import OracleRouter
from mobiq_lightning.strategies.routers.probed_layer import ProbedLayerRouter
from mobiq_lightning.strategies.routers.random import RandomRouter
from mobiq_lightning.strategies.routers.static import StaticRouter

__all__ = [
    "ErrorSketchRouter",
    "GradientLayerRouter",
    "LearnedLayerRouter",
    "LinearRouter",
    "MLPRouter",
    "NormRouter",
    "OracleRouter",
    "ProbedLayerRouter",
    "RandomRouter",
    "StaticRouter",
]
