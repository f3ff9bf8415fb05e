# What others may use of this package; `__init__.py` loads it when it is asked for.
from .policy import BitsPolicy as BitsPolicy
from .prompt import continue_prompt as continue_prompt
from .speed import measure_speed as measure_speed
from .speed import random_prompt as random_prompt
from .speed import seconds_per_step as seconds_per_step
from .speed import store_speed as store_speed
