# What others may use of this package; `__init__.py` loads it when it is asked for.
from .plain import COMMANDS as COMMANDS
from .plain import run as run
