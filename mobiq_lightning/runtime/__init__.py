"""Running an elastic model: the dial, the kernels in place of the reference, captured steps."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
