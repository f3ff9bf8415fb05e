# What others may use of this package; `__init__.py` loads it when it is asked for.
from .command import WIDTH as WIDTH
from .table import COMMANDS as COMMANDS
