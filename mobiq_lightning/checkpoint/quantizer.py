"""Makes elastic checkpoints known to transformers, by a `quantization_config` and a quantizer of its own kinds.

Importing this module registers both. It is imported while transformers is, so it must not need more of transformers than
what is imported here.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mobiq_lightning.checkpoint.check import (
    Expected,
    check_tensors,
    describe_problems,
)
from mobiq_lightning.checkpoint.contents import read_contents
from mobiq_lightning.checkpoint.format import QUANT_METHOD, ElasticFormat, check_json
from mobiq_lightning.checkpoint.load_call import current_call
from mobiq_lightning.checkpoint.named_classes import build_router, build_transform, router_class
from mobiq_lightning.checkpoint.own_files import read_hashes
from mobiq_lightning.checkpoint.saving import saved_with_hashes
from mobiq_lightning.checkpoint.values import value_problems
from mobiq_lightning.errors import CheckpointError
from mobiq_lightning.nn import (
    ElasticLinear,
    experts_of,
    make_shared_input,
    read_share,
    routed_inputs,
    stored_layout,
)
from mobiq_lightning.packing import compact, deeper_than, kind_of
from mobiq_lightning.runs import CONFIG, HASHES
from mobiq_lightning.runtime import make_elastic

SUPPORTED_TRANSFORMERS = (5,)
"""Major versions that the quantizer works with."""
SKIP_VERSION_CHECK = "MOBIQ_SKIP_VERSION_CHECK"


@register_quantization_config(QUANT_METHOD)
@dataclass(kw_only=True)
class ElasticConfig(ElasticFormat, QuantizationConfigMixin):
    """The format of an elastic checkpoint as transformers hands it from config.json to the quantizer and back."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Reads ``quantization_config`` of config.json, as `QuantizationConfigMixin.from_dict` of transformers does.

        Args:
            config_dict: The keys and values of config.json.
            return_unused_kwargs: Whether to return the format together with those of `kwargs` that are no key of it.
            **kwargs: Values of keys that take the place of those in config.json.

        Raises:
            CheckpointError: If a key or value cannot be read by this version of the package; the message names it.
        """
        check_json(config_dict, [field.name for field in fields(cls)])
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The keys and values of ``quantization_config`` that are stored in config.json."""
        return copy.deepcopy(self.to_json())


@register_quantizer(QUANT_METHOD)
class ElasticQuantizer(HfQuantizer):
    """Puts elastic linears into a model before its weights are loaded, having checked that the files fit them."""

    requires_calibration = True
    checked = True
    """Whether the bytes of the model were compared with hashes.json when it was loaded."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses versions of transformers that this quantizer was not tested with.

        Raises:
            CheckpointError: If such a version is installed and ``MOBIQ_SKIP_VERSION_CHECK`` is not set.
        """
        found = version("transformers")
        if int(found.split(".")[0]) not in SUPPORTED_TRANSFORMERS and not os.environ.get(SKIP_VERSION_CHECK):
            raise CheckpointError(
                f"transformers {found} is installed; elastic checkpoints were tested with transformers 5. Install that, "
                f"or set {SKIP_VERSION_CHECK}=1 to go on anyway"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Checks the folder of the model: here transformers knows where it is, and has built and read nothing of it yet.

        Raises:
            CheckpointError: If anything of it is damaged, or is not what its config.json claims.
        """
        if (named := getattr(config, "transformers_weights", None)) is not None:
            raise CheckpointError(
                f"config.json: transformers_weights names {named!r}; an elastic checkpoint names no weights"
            )
        folder = current_call().folder or Path(getattr(config, "_name_or_path", ""))
        router_class(self.quantization_config.router["class_path"])
        if (folder / CONFIG).is_file():
            read_contents(folder, current_call().check_hashes).require_whole()
        return super().update_attn_implementation(config)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        self.checked = current_call().check_hashes
        insert_elastic_linears(model, self.quantization_config)
        if checkpoint_files:
            files = [Path(file) for file in checkpoint_files]
            check_tensors(files, expected_tensors(model), self._known_hashes(files[0].parent))
        if (held := _n_planes(model)) < 8:  # deeper planes than are to be held are left in the file, with their values
            pattern = deeper_than(held)
            ignored: Any = model._keys_to_ignore_on_load_unexpected  # a set, in earlier versions a list or None
            both = ignored | {pattern} if isinstance(ignored, set) else [*(ignored or []), pattern]
            model._keys_to_ignore_on_load_unexpected = both  # type: ignore[assignment]

    def _known_hashes(self, folder: Path) -> dict[str, str] | None:
        """Hashes of the tensors in a folder, or None if they are not to be compared, or cannot be, which is said."""
        if not self.checked:
            return None
        hashes = read_hashes(folder)
        if hashes is None:
            self.checked = False
            warnings.warn(
                f"{folder} has no {HASHES}: what is loaded cannot be compared with what was written", stacklevel=2
            )
            return None
        return hashes.tensors

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        check_values(model)
        model.requires_grad_(False)
        make_elastic(model, self.quantization_config.threshold_scope, self.quantization_config.default_bits)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
        """Gives transformers what it saves of a model, routers in the dtype that checkpoints store them in, and no metadata."""
        state = model.state_dict()
        return {name: compact(value) if kind_of(name) == "router" else value for name, value in state.items()}, {}

    def saving(self, model: nn.Module, folder: Path) -> AbstractContextManager[None]:
        """Context in which transformers saves a model into a folder, which has hashes that fit when it ends.

        Raises:
            CheckpointError: If the folder holds a checkpoint with more planes, which would be lost.
        """
        return saved_with_hashes(folder, _n_planes(model), self.checked)

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """Whether models with this quantizer can be saved, which transformers asks: they can."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether models with this quantizer can be trained, which transformers asks: they cannot."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether models with this quantizer can be compiled, which transformers asks: they can."""
        return True


def insert_elastic_linears(model: nn.Module, stored: ElasticFormat) -> None:
    """Replaces the linears of a model's decoder blocks by empty elastic ones.

    Args:
        model: A causal language model of transformers, changed in place.
        stored: The format of the checkpoint that the elastic linears are to be loaded from.

    Raises:
        CheckpointError: If router or transform cannot be built.
        BitsError: If `max_bits` of the format is no prefix of the slices.
    """
    layout = stored_layout(stored.layout)
    layout.open(model, compare=False)
    slice_bits = tuple(stored.slice_bits)
    for block in layout.find(model):
        for names in layout.group_linears(block, stored.share_routers):
            linears: list[Any] = [block.get_submodule(name) for name in names]
            # The model is built in its own dtype, and tensors are loaded in the dtype that they were built in; scores and
            # thresholds need float32, or tokens that differ would compare equal.
            with _default_dtype(torch.float32):
                routed = make_shared_input(
                    linears,
                    slice_bits,
                    partial(build_router, stored.router),
                    partial(build_transform, stored.stored),
                    stored.max_bits,
                    stored.budget_step,
                    read_share(block, names[0]),
                )
            alone = experts_of(block, names[0]) is None
            for name, linear in zip(names, linears, strict=True):
                elastic = ElasticLinear(
                    linear.in_features,
                    linear.out_features,
                    slice_bits,
                    stored.group_size,
                    linear.bias is not None or "shift" in stored.stored,
                    stored.max_bits,
                    linear.weight.dtype,
                    stored.code,
                )
                elastic.attach(routed, carries_input=name == names[0], decides=alone)
                block.set_submodule(name, elastic)
    inputs = routed_inputs(model)
    for position, routed in enumerate(inputs):
        routed.router.place(position, len(inputs))


def check_values(model: nn.Module) -> None:
    """Checks the values that were loaded into elastic linears and routed inputs.

    Raises:
        CheckpointError: If scales, thresholds, budgets or routers have values that they cannot have.
    """
    problems: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, ElasticLinear):
            tensors = {f"{name}.{own}": value for own, value in module.state_dict().items()}
            falls = module.routed.router.per_token
            problems += [problem for key in tensors for problem in value_problems(key, tensors.__getitem__, falls)]
    if problems:
        raise CheckpointError(describe_problems(Path(str(getattr(model, "name_or_path", "") or ".")), problems))


def expected_tensors(model: Any) -> dict[str, Expected]:
    """Shape, kind and necessity of each tensor that a model with elastic linears is loaded from, by name."""
    tied: set[str] = set()
    if getattr(model.config, "tie_word_embeddings", False):
        output = model.get_output_embeddings()
        tied = {n for n, p in model.named_parameters(remove_duplicate=False) if p is getattr(output, "weight", None)}
        tied -= {n for n, m in model.named_modules() if m is model.get_input_embeddings() for n in [f"{n}.weight"]}
    return {name: Expected.of(value, name not in tied) for name, value in model.state_dict().items()}


def _n_planes(model: nn.Module) -> int:
    return next(module.n_planes for module in model.modules() if isinstance(module, ElasticLinear))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
