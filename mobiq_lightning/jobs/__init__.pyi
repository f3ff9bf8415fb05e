# What others may use of this package; `__init__.py` loads it when it is asked for.
from .cli import ElasticCLI as ElasticCLI
from .exit_codes import exit_code as exit_code
from .outliers import OutliersCLI as OutliersCLI
from .recipe import GROUPS as GROUPS
from .recipe import check_arguments as check_arguments
from .recipe import check_key as check_key
from .recipe import check_recipe as check_recipe
from .recipe import read_recipe as read_recipe
