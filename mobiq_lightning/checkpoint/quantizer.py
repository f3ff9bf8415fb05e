"""Makes elastic checkpoints known to transformers, by a `quantization_config` and a quantizer of its own kinds.

Importing this module registers both. It is imported while transformers is, so it must not need more of transformers than
what is imported here.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
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

from mobiq_lightning.checkpoint.check import Expected, check_tensors
from mobiq_lightning.checkpoint.format import QUANT_METHOD, ElasticFormat, check_json
from mobiq_lightning.errors import CheckpointError
from mobiq_lightning.nn import BlockLayout, ElasticLinear, make_shared_input, routed_inputs
from mobiq_lightning.packing import deeper_than
from mobiq_lightning.runs import HASHES
from mobiq_lightning.runtime import make_elastic
from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.transform_base import StoredTransform

SUPPORTED_TRANSFORMERS = (5,)
"""Major versions that the quantizer works with."""
SKIP_VERSION_CHECK = "MOBIQ_SKIP_VERSION_CHECK"


@register_quantization_config(QUANT_METHOD)
@dataclass(kw_only=True)
class ElasticConfig(ElasticFormat, QuantizationConfigMixin):
    """The format of an elastic checkpoint as transformers hands it from config.json to the quantizer and back.

    Args:
        check_hashes: Whether loading compares the tensors that it reads with hashes.json. Not stored.
    """

    check_hashes: bool = True

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

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        config = self.quantization_config
        insert_elastic_linears(model, config)
        if checkpoint_files:
            files = [Path(file) for file in checkpoint_files]
            hashes = files[0].parent / HASHES
            known = None
            if config.check_hashes and hashes.is_file():
                known = json.loads(hashes.read_text(encoding="utf-8"))["tensors"]
            check_tensors(files, expected_tensors(model), known)
        if (held := _n_planes(model)) < 8:  # deeper planes than are to be held are left in the file, with their values
            pattern = deeper_than(held)
            ignored: Any = model._keys_to_ignore_on_load_unexpected  # a set, in earlier versions a list or None
            both = ignored | {pattern} if isinstance(ignored, set) else [*(ignored or []), pattern]
            model._keys_to_ignore_on_load_unexpected = both  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        model.requires_grad_(False)
        make_elastic(model, self.quantization_config.threshold_scope, self.quantization_config.default_bits)

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
    layout = BlockLayout(**stored.layout)
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
                )
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
                elastic.attach(routed, carries_input=name == names[0])
                block.set_submodule(name, elastic)
    inputs = routed_inputs(model)
    for position, routed in enumerate(inputs):
        routed.router.place(position, len(inputs))


def build_router(spec: dict[str, Any], in_features: int, n_slices: int) -> Router:
    """Builds the router that config.json names, for one input.

    Args:
        spec: Mapping with ``class_path`` and ``init_args``.
        in_features: Width of the input.
        n_slices: Number of slices.

    Raises:
        CheckpointError: If the class cannot be imported or built, or is no router, since config.json must not be able
            to call anything else.
    """
    name = str(spec.get("class_path"))
    module, _, last = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"this elastic checkpoint was made with {name}, which cannot be imported here ({error}). Put its module on "
            "the Python path"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Router)):
        raise CheckpointError(f"config.json names {name} as router, which is no mobiq_lightning.strategies.Router")
    try:
        return cls(in_features, n_slices, **spec.get("init_args", {}))
    except TypeError as error:
        raise CheckpointError(f"config.json: the router {name} cannot be built: {error}") from error


def build_transform(stored: list[str], in_features: int) -> StoredTransform | None:
    """Makes the empty transform of an input, to be loaded from a checkpoint.

    Args:
        stored: Names of the tensors that the checkpoint holds of the transform.
        in_features: Width of the input.

    Returns:
        The transform, or None if the checkpoint holds no tensors of one.

    Raises:
        CheckpointError: If a tensor is named that this version does not know.
    """
    try:
        return StoredTransform(in_features, stored) if stored else None
    except ValueError as error:
        raise CheckpointError(
            f"config.json: transform.stored: {error}. The checkpoint is damaged, or newer than this version of "
            "mobiq-lightning"
        ) from error


def expected_tensors(model: Any) -> dict[str, Expected]:
    """Shape, kind and necessity of each tensor that a model with elastic linears is loaded from, by name."""
    tied: set[str] = set()
    if getattr(model.config, "tie_word_embeddings", False):
        output = model.get_output_embeddings()
        tied = {n for n, p in model.named_parameters(remove_duplicate=False) if p is getattr(output, "weight", None)}
        tied -= {n for n, m in model.named_modules() if m is model.get_input_embeddings() for n in [f"{n}.weight"]}
    return {
        name: Expected(tuple(value.shape), value.dtype == torch.uint8, name not in tied)
        for name, value in model.state_dict().items()
    }


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
