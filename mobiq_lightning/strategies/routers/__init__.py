"""Routers: which tokens read how many slices."""

from mobiq_lightning.strategies.routers.mlp import MLPRouter
from mobiq_lightning.strategies.routers.random import RandomRouter
from mobiq_lightning.strategies.routers.static import StaticRouter

__all__ = ["MLPRouter", "RandomRouter", "StaticRouter"]
