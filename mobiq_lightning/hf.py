"""The elastic checkpoint as a Hugging Face model: `quantization_config`, quantizer, and a loader that is strict.

Importing this module registers the quantizer; `load` is the way in.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mobiq_lightning.errors import CheckpointError
from mobiq_lightning.layers import ElasticLinear, routed_inputs
from mobiq_lightning.packing import FORMAT_VERSION, QUANT_METHOD
from mobiq_lightning.routed_input import RoutedInput
from mobiq_lightning.source import BlockLayout, Share
from mobiq_lightning.strategies.thresholds import Scope


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
        format_version: Of the tensors' names and meaning.
    """

    def __init__(
        self,
        slice_bits: list[int],
        group_size: int,
        router: dict[str, Any],
        layout: dict[str, Any],
        share_routers: Share = "input",
        threshold_scope: Scope = "layer",
        format_version: int = FORMAT_VERSION,
        **_: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.slice_bits, self.group_size = list(slice_bits), group_size
        self.router, self.layout, self.share_routers = router, layout, share_routers
        self.threshold_scope: Scope = threshold_scope
        self.format_version = format_version
        if format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"this elastic checkpoint has format version {format_version}; this version of mobiq-lightning reads "
                f"up to {FORMAT_VERSION}. Update mobiq-lightning"
            )


@register_quantizer(QUANT_METHOD)
class ElasticQuantizer(HfQuantizer):
    """Puts elastic linears into a model before its weights are loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        insert_elastic_linears(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        model.requires_grad_(False)

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """Elastic models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """They are not trained in this form."""
        return False


def insert_elastic_linears(model: nn.Module, config: ElasticConfig) -> None:
    """Replaces the linears of a model's decoder blocks by empty elastic ones."""
    layout = BlockLayout(**config.layout)
    slice_bits = tuple(config.slice_bits)
    for block in layout.find(model):
        for names in layout.group_linears(block, config.share_routers):
            linears: list[Any] = [block.get_submodule(name) for name in names]
            routed = RoutedInput(
                build(config.router, linears[0].in_features, len(slice_bits)),
                slice_bits,
                sum(linear.weight.numel() for linear in linears),
            )
            # The model is built in its own dtype, and tensors are loaded in the dtype that they were built in; scores and
            # thresholds need float32, or tokens that differ would compare equal.
            routed.float()
            for name, linear in zip(names, linears, strict=True):
                elastic = ElasticLinear(
                    linear.in_features,
                    linear.out_features,
                    slice_bits,
                    config.group_size,
                    linear.bias is not None,
                    dtype=linear.weight.dtype,
                )
                elastic.attach(routed)
                if name == names[0]:  # one of the linears carries the input in the model's tree
                    elastic.add_module("input", routed)
                parent, _, last = name.rpartition(".")
                setattr(block.get_submodule(parent), last, elastic)
    inputs = routed_inputs(model)
    for position, routed in enumerate(inputs):
        routed.router.place(position, len(inputs))


def build(spec: dict[str, Any], *args: Any) -> Any:
    """Instance of ``{"class_path", "init_args"}`` with positional arguments in front."""
    module, _, name = spec["class_path"].rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"this elastic checkpoint was made with {spec['class_path']}, which cannot be imported here ({error}). "
            "Put its module on the Python path"
        ) from error
    return cls(*args, **spec.get("init_args", {}))


def load(folder: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu") -> Any:
    """Loads an elastic checkpoint.

    Args:
        folder: The ``elastic`` folder of a run, or a run folder.
        dtype: Of what is not sliced, and of the computation.
        device: Where to.

    Returns:
        The transformers model with `ElasticLinear` in its blocks, in eval mode.

    Raises:
        CheckpointError: If the folder is no elastic checkpoint, or a tensor is missing or left over.
    """
    path = Path(folder)
    path = path / "elastic" if (path / "elastic" / "config.json").is_file() else path
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no elastic checkpoint; a finished `fit` leaves one in <run folder>/elastic"
        )
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[key]:
            names = sorted(map(str, info[key]))
            raise CheckpointError(f"{path}: {len(names)} {key.replace('_', ' ')}, such as {', '.join(names[:3])}")
    if not routed_inputs(model):
        raise CheckpointError(f"{path} holds an ordinary model, not an elastic one")
    return model.to(device).eval()
