"""The elastic checkpoint: writing it block by block, reading it through transformers, checking and describing it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
