"""Grids of strategies and seeds: run, resumed, compared at equal bits, reported."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
