"""The LightningModule and what it trains with: stages, hidden states, whole blocks and whole models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
