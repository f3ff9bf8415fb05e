"""A run folder: its files, whose it is, and what a run leaves in it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
