"""What a transform must be, and what is done to one input and undone in the weights that read it.

Letters in shapes: N tokens, O/I out/in features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobiq_lightning.strategies.class_paths import describe_class

STORED = ("scale", "shift")
"""Names of the tensors that a checkpoint holds of an input, in this order; all, the first, or none."""


class Transform:
    """What is done to weights and inputs before weights are sliced; it does not change the model in full precision.

    A plug-in folds something into the weights of the source model (`change_model`), or gives inputs a transform that is
    learned and applied at run time (`for_input`), or both. It keeps the arguments of its ``__init__`` as attributes of the
    same names.
    """

    def change_model(self, model: Any, blocks: nn.ModuleList) -> dict[str, Any]:
        """Changes the weights of the source model in place, before anything is sliced. Must be the same in every process.

        Args:
            model: The causal language model, of transformers, on the host.
            blocks: Its decoder blocks.

        Returns:
            Keys of config.json that have other values in the changed model.

        Raises:
            ModelError: If the model has parts that cannot be changed with the rest; it is then unchanged.
        """
        return {}

    @property
    def changes_model(self) -> bool:
        """Whether it folds anything into the weights of the source model."""
        return type(self).change_model is not Transform.change_model

    def for_input(self, in_features: int) -> InputTransform | None:
        """Makes the learned transform of an input of `in_features` channels; None if linears read it as it is."""
        return None

    def describe(self) -> dict[str, Any]:
        """Describes this transform as recipes and checkpoints do, by ``{"class_path", "init_args"}``."""
        cls = type(self)
        arguments = list(signature(cls.__init__).parameters)[1:] if cls.__init__ is not object.__init__ else []
        return describe_class(cls, {name: getattr(self, name) for name in arguments})


class InputTransform(nn.Module, ABC):
    """A scale s and a shift d for each channel of one input, which change no product in full precision::

        W x + b = (W diag(s)) ((x - d) / s) + (b + W d)

    ``W diag(s)`` is what is sliced. Only products read ``(x - d) / s``; the router of the input reads x, since what it
    scores would drift while s and d are learned.

    Args:
        in_features: Channels of the input, I.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features

    @abstractmethod
    def channel_scale(self) -> Tensor:
        """Scale s of each channel, (I,) float32, above 0."""

    @abstractmethod
    def channel_shift(self) -> Tensor | None:
        """Shift d of each channel, (I,) float32; None if channels are not shifted."""

    def initialize(self, x: Tensor, weights: Sequence[Tensor]) -> None:
        """Sets what is learned to its initial values, as a function of the arguments alone.

        Args:
            x: (N, I) tokens of this input in the full-precision block.
            weights: (O, I) of each linear that reads it.
        """

    def to_input(self, x: Tensor) -> Tensor:
        """Transforms tokens (..., I) to ``(x - d) / s``, computed in float32 and rounded to the dtype of `x`."""
        shift = self.channel_shift()
        centred = x.float() if shift is None else x.float() - shift
        return (centred / self.channel_scale()).to(x.dtype)

    def to_weight(self, weight: Tensor) -> Tensor:
        """Transforms a weight (O, I) to ``W diag(s)``, float32, on the device of the transform."""
        scale = self.channel_scale()
        return weight.to(scale.device, torch.float32) * scale

    def to_bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Transforms the bias of a linear to ``b + W d``, which makes up for the shift of its input.

        Args:
            weight: (O, I) the full-precision weight, without the scale.
            bias: (O,) the bias of the linear; None if it has none.

        Returns:
            (O,) in the dtype of the weight, computed in float32; None if there is neither a bias nor a shift.
        """
        shift = self.channel_shift()
        if shift is None:
            return bias
        added = F.linear(shift, weight.to(shift.device, torch.float32))
        if bias is not None:
            added = added + bias.to(shift.device, torch.float32)
        return added.to(weight.dtype)

    def stored(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint holds of this transform: ``scale`` (I,) and, if there is one, ``shift`` (I,)."""
        shift = self.channel_shift()
        return {"scale": self.channel_scale()} | ({} if shift is None else {"shift": shift})


class StoredTransform(InputTransform):
    """An input's transform as it is saved and run, whatever it was learned by.

    Args:
        in_features: Channels of the input, I.
        names: Names of the tensors that are held: ``scale``, or ``scale`` and ``shift``.

    Raises:
        ValueError: If the names are any others.
    """

    def __init__(self, in_features: int, names: Sequence[str]) -> None:
        super().__init__(in_features)
        if tuple(names) != STORED[: len(names)] or not names:
            raise ValueError(f"the tensors of a stored transform are {' and '.join(STORED)}, or the first; not {names}")
        for name in names:
            self.register_buffer(name, torch.ones(in_features) if name == "scale" else torch.zeros(in_features))

    def channel_scale(self) -> Tensor:
        """Stored scale s of each channel, (I,) float32, above 0."""
        return self.get_buffer("scale")

    def channel_shift(self) -> Tensor | None:
        """Stored shift d of each channel, (I,) float32; None if channels are not shifted."""
        return self._buffers.get("shift")
