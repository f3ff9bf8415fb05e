# What users of this package import from it; `__init__.py` loads it when it is asked for.
from .checkpoint import load as load
from .checkpoint import verify as verify
from .comparison import compare as compare
from .jobs import check as check
from .jobs import fit as fit
from .jobs import validate as validate
from .serving import BitsPolicy as BitsPolicy
from .version import __version__ as __version__
