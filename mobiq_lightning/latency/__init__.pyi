# What others may use of this package; `__init__.py` loads it when it is asked for.
from .command import measure as measure
from .names import check_names as check_names
from .of_model import time_linears as time_linears
from .report import print_budgets as print_budgets
from .timing import Clock as Clock
from .tune import tune_here as tune_here
