# What others may use of this package; `__init__.py` loads it when it is asked for.
from .apply_transform import initialize_transforms as initialize_transforms
from .block_batch import ROUTED as ROUTED
from .checkpoint_io import SafeCheckpointIO as SafeCheckpointIO
from .checkpoint_io import can_be_read as can_be_read
from .device_memory import measuring_bytes as measuring_bytes
from .device_memory import move_model as move_model
from .device_memory import whole_model_on_device as whole_model_on_device
from .disk_space import say_if_short as say_if_short
from .elastic_checkpoint import checkpoint_writer as checkpoint_writer
from .elastic_checkpoint import finish_checkpoint as finish_checkpoint
from .fit_checks import check_strategy as check_strategy
from .hidden_states import eval_mode as eval_mode
from .module import ElasticCalibration as ElasticCalibration
from .scores import block_scores_of as block_scores_of
from .scores import scores_of as scores_of
from .stage_training import begin_stage as begin_stage
from .stage_training import end_stage as end_stage
