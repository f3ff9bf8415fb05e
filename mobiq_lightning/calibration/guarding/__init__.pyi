# What others may use of this package; `__init__.py` loads it when it is asked for.
from .collapse import COLLAPSE_SHARE as COLLAPSE_SHARE
from .collapse import mixes_depths as mixes_depths
from .collapse import most_common_share as most_common_share
from .collapse import worst_share as worst_share
from .fallback import State as State
from .fallback import restore as restore
from .fallback import round_block as round_block
from .fallback import state_of as state_of
from .probe import Measured as Measured
from .probe import Probe as Probe
