"""The elastic checkpoint as transformers sees it: `quantization_config` and quantizer.

Importing this module registers both. It is imported while transformers is, so it must not need more of transformers than
what is imported here.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mobiq_lightning.checkpoint.check import Expected, check_tensors
from mobiq_lightning.errors import CheckpointError
from mobiq_lightning.nn import BlockLayout, ElasticLinear, RoutedInput, Share, routed_inputs
from mobiq_lightning.packing import CODES, FORMAT_VERSION, QUANT_METHOD, PackedSlices
from mobiq_lightning.runs import HASHES
from mobiq_lightning.runtime import make_elastic
from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.thresholds import Scope
from mobiq_lightning.strategies.transform_base import StoredTransform

SUPPORTED_TRANSFORMERS = (5,)
"""Major versions that the quantizer works with."""
SKIP_VERSION_CHECK = "MOBIQ_SKIP_VERSION_CHECK"


@register_quantization_config(QUANT_METHOD)
class ElasticConfig(QuantizationConfigMixin):
    """What config.json says of an elastic checkpoint.

    Args:
        slice_bits: Bits of each slice.
        group_size: Columns per group.
        router: ``{"class_path", "init_args"}`` of the routers.
        layout: Arguments of `BlockLayout`.
        share_routers: Which linears share a router.
        threshold_scope: Which of the two threshold tables is used unless another is asked for.
        default_bits: Where the dial stands after loading.
        max_bits: The depth up to which planes are held; None for all.
        transform: ``{"class_path", "init_args", "stored"}`` of what was done to weights and inputs before slicing; `stored`
            names the tensors that are left of it per input.
        format_version: Of the tensors' names and meaning; by default that of the code.
        code: How codes become weights, one of `CODES`. Not stored if it is the nested code, which older versions read.
        check_hashes: Whether loading compares the tensors that it reads with hashes.json. Not stored.
    """

    def __init__(
        self,
        slice_bits: list[int],
        group_size: int,
        router: dict[str, Any],
        layout: dict[str, Any],
        share_routers: Share = "input",
        threshold_scope: Scope = "layer",
        default_bits: float = 4.0,
        max_bits: int | None = None,
        transform: dict[str, Any] | None = None,
        format_version: int | None = None,
        code: str = PackedSlices.code,
        check_hashes: bool = True,
        **_: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.format_version, self.code = format_version or CODES[code].format_version, code
        self.slice_bits, self.group_size = list(slice_bits), group_size
        self.router, self.layout, self.share_routers = router, layout, share_routers
        self.threshold_scope: Scope = threshold_scope
        self.default_bits, self.max_bits = default_bits, max_bits
        self.transform = transform
        self.check_hashes = check_hashes

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """See transformers.

        Raises:
            CheckpointError: If the format is newer than this package, its code is unknown, or a key is missing.
        """
        found = config_dict.get("format_version", PackedSlices.format_version)
        if not isinstance(found, int) or found > FORMAT_VERSION:
            raise CheckpointError(
                f"this elastic checkpoint has format version {found}; this version of mobiq-lightning reads up to "
                f"{FORMAT_VERSION}. Update mobiq-lightning"
            )
        code = config_dict.get("code", PackedSlices.code)
        if code not in CODES:
            raise CheckpointError(f"config.json: there is no code {code!r}; there are {', '.join(CODES)}")
        missing = [key for key in ("slice_bits", "group_size", "router", "layout") if key not in config_dict]
        if missing:
            raise CheckpointError(
                f"config.json: quantization_config lacks {', '.join(missing)}; the file is damaged or no elastic "
                "checkpoint's"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What is stored."""
        stored = super().to_dict()
        stored.pop("check_hashes", None)
        if self.code == PackedSlices.code:
            del stored["code"]
        return dict(stored)


@register_quantizer(QUANT_METHOD)
class ElasticQuantizer(HfQuantizer):
    """Puts elastic linears into a model before its weights are loaded, having checked that the files fit them."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses versions of transformers that this was not made for."""
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
            pattern = rf"\.(plane|slice_[a-z]+)_[{held}-7]$"
            ignored: Any = model._keys_to_ignore_on_load_unexpected  # a set, in earlier versions a list or None
            both = ignored | {pattern} if isinstance(ignored, set) else [*(ignored or []), pattern]
            model._keys_to_ignore_on_load_unexpected = both  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        model.requires_grad_(False)
        make_elastic(model, self.quantization_config.threshold_scope, self.quantization_config.default_bits)

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """Elastic models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """They are not trained in this form."""
        return False

    @property
    def is_compileable(self) -> bool:
        """They can be compiled."""
        return True


def insert_elastic_linears(model: nn.Module, config: ElasticConfig) -> None:
    """Replaces the linears of a model's decoder blocks by empty elastic ones."""
    layout = BlockLayout(**config.layout)
    slice_bits = tuple(config.slice_bits)
    stored = (config.transform or {}).get("stored", [])
    for block in layout.find(model):
        for names in layout.group_linears(block, config.share_routers):
            linears: list[Any] = [block.get_submodule(name) for name in names]
            # The model is built in its own dtype, and tensors are loaded in the dtype that they were built in; scores and
            # thresholds need float32, or tokens that differ would compare equal.
            with _default_dtype(torch.float32):
                routed = RoutedInput(
                    build_router(config.router, linears[0].in_features, len(slice_bits)),
                    slice_bits,
                    sum(linear.weight.numel() for linear in linears),
                    config.max_bits,
                    build_transform(stored, linears[0].in_features),
                )
            for name, linear in zip(names, linears, strict=True):
                elastic = ElasticLinear(
                    linear.in_features,
                    linear.out_features,
                    slice_bits,
                    config.group_size,
                    linear.bias is not None or "shift" in stored,
                    config.max_bits,
                    linear.weight.dtype,
                    config.code,
                )
                elastic.attach(routed)
                if name == names[0]:  # one of the linears carries the input in the model's tree
                    elastic.add_module("input", routed)
                parent, _, last = name.rpartition(".")
                setattr(block.get_submodule(parent), last, elastic)
    inputs = routed_inputs(model)
    for position, routed in enumerate(inputs):
        routed.router.place(position, len(inputs))


def build_router(spec: dict[str, Any], in_features: int, n_slices: int) -> Router:
    """The router that config.json names.

    Raises:
        CheckpointError: If it cannot be imported, or is no router: config.json must not be able to call anything else.
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
    """The transform of an input, of which a checkpoint holds the tensors named; None if it holds none.

    Raises:
        CheckpointError: If other tensors are named than this version knows.
    """
    try:
        return StoredTransform(in_features, stored) if stored else None
    except ValueError as error:
        raise CheckpointError(
            f"config.json: transform.stored: {error}. The checkpoint is damaged, or newer than this version of "
            "mobiq-lightning"
        ) from error


def expected_tensors(model: Any) -> dict[str, Expected]:
    """Names, shapes and necessity of the tensors that a model with elastic linears is loaded from."""
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
