"""The layers: a linear that is calibrated, the same linear as it is run, and the input that routes its tokens."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
