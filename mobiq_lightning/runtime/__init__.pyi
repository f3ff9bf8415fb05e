# What others may use of this package; `__init__.py` loads it when it is asked for.
from .counting import BitsUsed as BitsUsed
from .dial import Dial as Dial
from .elastic_model import make_elastic as make_elastic
from .graphed_step import GraphedStep as GraphedStep
from .graphed_step import cache_name as cache_name
from .kernel_input import KernelInput as KernelInput
from .one_block import elastic_block_by_block as elastic_block_by_block
from .warming import warm_up as warm_up
