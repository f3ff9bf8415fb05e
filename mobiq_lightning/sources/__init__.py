"""What goes in: the source model, the calibration text, and the model and text that are built in."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
