"""What a run will take, known before it begins: sizes, memory, disk, time; and how much of the time is left."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
