# What others may use of this package; `__init__.py` loads it when it is asked for.
from .running import compare as compare
