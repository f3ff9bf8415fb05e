"""Abilities of an elastic model beside those of transformers: it can turn its dial, and tell the bits that it used."""

from __future__ import annotations

import functools
import inspect
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mobiq_lightning.errors import CheckpointError, KernelError
from mobiq_lightning.kernels import missing_for_code, missing_for_kernels
from mobiq_lightning.nn import KEPT_BYTES, ElasticLinear, KeptWeights, input_names, routed_inputs, stored_bits
from mobiq_lightning.runtime.counting import BitsUsed
from mobiq_lightning.runtime.dial import Budget, Dial
from mobiq_lightning.runtime.fused_blocks import fuse_blocks
from mobiq_lightning.runtime.graphed_step import CACHE_NAMES, GraphedStep
from mobiq_lightning.runtime.kernel_input import attach_kernels, detach_kernels
from mobiq_lightning.strategies.thresholds import Scope


@dataclass
class KernelState:
    """Whether the linears of a model are multiplied by the Triton kernels.

    Args:
        wanted: Whether the kernels are to be used; None to use them on CUDA devices.
        known_for: Device and dtype of the model for which `missing` was found out.
        missing: Reason why the kernels are not used; None if they are.
    """

    wanted: bool | None = None
    known_for: tuple[torch.device, torch.dtype] | None = None
    missing: str | None = "the model has not been run yet"


class ElasticModel:
    """A causal language model whose bits per weight can be set while it runs.

    It is mixed into the class of a model of transformers when an elastic checkpoint is loaded.
    """

    dial: Dial
    kept: KeptWeights
    kernels: KernelState
    plain_class: ClassVar[type]
    """The class of the model in transformers, in front of which this one is mixed."""
    forward_names: ClassVar[tuple[str, ...]]
    """Names of the arguments of its forward pass, in their order."""

    def set_bits(self, bits: Budget, scope: Scope | None = None) -> None:
        """Makes the model run at `bits` bits per weight on average from now on; takes effect with the next token.

        Args:
            bits: Average bits per weight, one figure, or (B,) with one for each row of the batches to come.
            scope: Threshold table, ``layer`` or ``global``; by default that of the checkpoint.

        Raises:
            BitsError: If a budget is outside of what the loaded planes can give.
        """
        self.dial.set_bits(bits, scope)

    def bits(self, bits: Budget, scope: Scope | None = None) -> AbstractContextManager[None]:
        """Context in which the model runs at `bits` bits per weight on average; afterwards it runs as before.

        Args:
            bits: Average bits per weight, one figure, or (B,) with one for each row of the batches to come.
            scope: Threshold table, ``layer`` or ``global``; by default that of the checkpoint.

        Raises:
            BitsError: If a budget is outside of what the loaded planes can give.
        """
        return self.dial.bits(bits, scope)

    @property
    def budget(self) -> float | Tensor | None:
        """Average bits per weight asked for at present, one figure or (B,); `bits_used` tells how many were read."""
        return self.dial.budget

    def bits_used(self, per_layer: bool = False) -> BitsUsed:
        """Measures the bits read since `set_bits`, or in the last `generate` or `with model.bits(...)`.

        Args:
            per_layer: Whether every input is reported too, under the name of the first linear that reads it.

        Raises:
            BitsError: If the model has read nothing since.
        """
        model: Any = self
        return self.dial.bits_used(input_names(model) if per_layer else ())

    @property
    def path(self) -> str:
        """Path that products take: ``kernels``, or ``reference:`` with the reason why not the kernels."""
        self.find_kernels()
        return "kernels" if self.kernels.missing is None else f"reference: {self.kernels.missing}"

    def switch_kernels(self, wanted: bool = True) -> None:
        """Makes the model multiply by the Triton kernels from now on, or by the reference.

        Args:
            wanted: Whether the kernels are used; False for the reference.

        Raises:
            KernelError: If the kernels are wanted but cannot run here.
        """
        self.kernels = KernelState(wanted)
        if not wanted:
            detach_kernels(self)  # type: ignore[arg-type]
        self.find_kernels()
        if wanted and self.kernels.missing is not None:
            raise KernelError(f"the kernels cannot be used: {self.kernels.missing}")

    def find_kernels(self) -> None:
        """Brings the weights into the kernels' order if the model has come to a device where kernels run."""
        model: Any = self
        here = (model.device, model.dtype)
        attached = self.dial.inputs[0].kernel is not None
        if self.kernels.known_for == here and attached == (self.kernels.missing is None):
            return
        self.kernels.known_for = here
        if self.kernels.wanted is False:
            self.kernels.missing = "switched off"
        elif self.kernels.wanted or here[0].type == "cuda":
            self.kernels.missing = attach_kernels(model, here[1])
            if self.kernels.missing is not None and here[0].type == "cuda":
                warnings.warn(f"the model runs on the slow reference: {self.kernels.missing}", stacklevel=2)
        else:
            code = next(module.code for module in model.modules() if isinstance(module, ElasticLinear))
            self.kernels.missing = missing_for_code(code) or missing_for_kernels(*here)

    def keep_weights(self, n_bytes: int) -> None:
        """Sets how much memory the reference may keep dequantized weights in; others are unpacked for every call.

        Args:
            n_bytes: Limit in bytes for the whole model; 0 keeps none.
        """
        self.kept.clear()
        self.kept.limit_bytes = n_bytes

    def get_compiled_call(self, compile_config: Any) -> Any:
        """Gives transformers a CUDA graph to decode with a static cache, unless a way to compile is given."""
        if compile_config is not None and not getattr(compile_config, "_compile_all_devices", False):
            return super().get_compiled_call(compile_config)  # type: ignore[misc]
        model: Any = self
        on_several = len(set(getattr(self, "hf_device_map", {}).values())) > 1
        return model.__call__ if on_several else GraphedStep(model)  # a graph holds the work of one device

    def generate(self, *args: Any, bits: Budget | None = None, **kwargs: Any) -> Any:
        """Generates text as `generate` of transformers does, at `bits` bits per weight on average.

        The dial may be turned between tokens, say by a logits processor that calls `set_bits`; the KV cache is kept. Calls from
        several threads are answered one after the other, each at its own bits.

        Args:
            *args: Arguments of `generate` of transformers.
            bits: Budget of this call, one figure or one for each row of the batch; by default where the dial stands.
            **kwargs: Keyword arguments of `generate` of transformers.

        Raises:
            BitsError: If a budget is out of range, or there are not as many budgets as rows.
        """
        given = (args[0] if args else None, *(kwargs.get(k) for k in ("inputs", "input_ids", "inputs_embeds")))
        batch = next((len(value) for value in given if isinstance(value, Tensor)), 1)
        with self.dial.generation(bits, batch):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the model as `save_pretrained` of transformers does, with hashes of what was written. The dial is not saved.

        Args:
            save_directory: The folder. Other files in it stay.
            *args: Arguments of `save_pretrained` of transformers.
            push_to_hub: Whether to upload the folder's checkpoint afterwards, with its hashes.
            **kwargs: Keyword arguments of `save_pretrained` of transformers; with `push_to_hub`, ``repo_id`` and others of it.

        Raises:
            CheckpointError: If the folder holds the same checkpoint with more planes than this model, which would be lost.
        """
        model: Any = self
        if getattr(model, "_hf_peft_config_loaded", False) or not kwargs.get("is_main_process", True):
            super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]
            return
        if kwargs.get("variant") is not None:
            raise CheckpointError(
                "save_pretrained: variant cannot be given; an elastic checkpoint has one set of tensors"
            )
        hub = {
            name: kwargs.pop(name) for name in ("repo_id", "commit_message", "private", "create_pr") if name in kwargs
        }
        with model.hf_quantizer.saving(self, Path(save_directory)):
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if push_to_hub:
            hub.setdefault("repo_id", Path(save_directory).name)
            model.push_to_hub(**hub, token=kwargs.get("token"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as its plain class and this one, since the class that joins them is made at run time."""
        reduced: Any = super().__reduce_ex__(2)
        return (_rebuild, (self.plain_class,), *reduced[2:])


def make_elastic(model: Any, scope: Scope, bits: float) -> None:
    """Turns a model whose linears are elastic into an `ElasticModel`, in place.

    Args:
        model: Loaded causal language model of transformers.
        scope: Default threshold table of the model, ``layer`` or ``global``.
        bits: Average bits per weight that the dial is set to; clamped to what the model holds.
    """
    inputs = routed_inputs(model)
    model.__class__ = elastic_class(type(model))  # type: ignore[arg-type]
    model.dial = Dial(inputs, scope, *stored_bits(model))
    linears = [module for module in model.modules() if isinstance(module, ElasticLinear)]
    model.kept = KeptWeights(KEPT_BYTES, sum(len(linear.slice_bits) for linear in linears))
    for linear in linears:
        linear.kept = model.kept
    model.kernels = KernelState()
    fuse_blocks(model)
    model.dial.set_bits(min(max(bits, model.dial.lowest), model.dial.highest))
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)


@functools.cache
def elastic_class(cls: Any) -> Any:
    """Joins `ElasticModel` and `cls` in a class named like `cls`, so that saved configs name one that is known."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    names |= {"plain_class": cls, "forward_names": tuple(inspect.signature(cls.forward).parameters)[1:]}
    return type(cls.__name__, (ElasticModel, cls), names)


def _before_forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Attaches the kernels where the model is now, and makes the counts leave out what a mask marks as padding."""
    if not torch.compiler.is_compiling():
        model.find_kernels()
    given = {**dict(zip(model.forward_names, args, strict=False)), **kwargs}
    tokens, mask = given.get("input_ids"), given.get("attention_mask")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    counted = None
    if isinstance(mask, Tensor) and isinstance(tokens, Tensor):
        if mask.ndim == 2:
            counted = mask[:, -tokens.shape[1] :]
        elif mask.ndim == 4 and tokens.shape[1] > 1 and not torch.compiler.is_compiling():
            counted = _seen(
                mask, tokens, next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
            )
    model.dial.state.mask = counted
    model.dial.state.shape = tuple(tokens.shape[:2]) if isinstance(tokens, Tensor) and tokens.ndim > 1 else None


def _seen(mask: Tensor, tokens: Tensor, cache: Any) -> Tensor | None:
    """Which tokens any token may attend to, itself included: all that are no padding.

    Args:
        mask: (B or 1, heads or 1, T, keys) true, or above the lowest number, where a token sees a key. Static caches have keys
            for tokens to come.
        tokens: (B, T) or (B, T, H), more than one: a token alone is never padding, and its step may be captured in a graph.
        cache: Key-value cache, whose length says at which key the tokens begin; None if the keys are theirs alone.

    Returns:
        (B, T) bool; None if the keys of the tokens cannot be told from others.
    """
    rows, count = tokens.shape[:2]
    if cache is not None and not hasattr(cache, "get_seq_length"):  # pages of many sequences, which hold no padding
        return None
    start = mask.shape[-1] - count if cache is None else int(cache.get_seq_length())
    if start < 0 or start + count > mask.shape[-1]:
        return None
    open_keys = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return open_keys[..., start : start + count].flatten(1, 2).any(1).expand(rows, -1)


def _rebuild(cls: type) -> Any:
    elastic = elastic_class(cls)
    return elastic.__new__(elastic)
