# What others may use of this package; `__init__.py` loads it when it is asked for.
from .arguments import override_arguments as override_arguments
from .cli import ElasticCLI as ElasticCLI
from .exit_codes import exit_code as exit_code
from .recipe import check_key as check_key
from .recipe import check_recipe as check_recipe
from .recipe import read_recipe as read_recipe
from .recipe_help import describe_keys as describe_keys
from .running import build as build
from .running import fit as fit
from .running import run_job as run_job
from .running import validate as validate
from .shipped import GRIDS as GRIDS
from .shipped import recipe_path as recipe_path
from .shipped import shipped_recipe as shipped_recipe
from .shipped import shipped_recipes as shipped_recipes
from .study import outliers as outliers
from .study import run_outliers as run_outliers
