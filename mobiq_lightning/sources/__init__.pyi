# What others may use of this package; `__init__.py` loads it when it is asked for.
from .generated_text import SourceWriter as SourceWriter
from .model import Source as Source
from .model import load_source as load_source
from .model_checks import check_finite as check_finite
from .model_files import former_fingerprint as former_fingerprint
from .overflow import check_output as check_output
from .text import check_ids as check_ids
from .windows import IGNORED as IGNORED
from .windows import ComparisonPass as ComparisonPass
from .windows import TextWindows as TextWindows
from .windows import Windows as Windows
from .windows import Write as Write
from .windows import pad_windows as pad_windows
