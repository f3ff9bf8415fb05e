# What others may use of this package; `__init__.py` loads it when it is asked for.
from .input import ReportCell as ReportCell
from .input import ReportInput as ReportInput
from .page import write_report as write_report
from .runs import not_finite as not_finite
from .tables import Value as Value
from .tables import columns_of as columns_of
from .tables import lines_of as lines_of
