"""Serving a checkpoint: which bits to run at, how fast they are, and continuing a prompt."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
