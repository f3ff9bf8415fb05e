"""One decoding step as a CUDA graph: the host launches once per token instead of once per operation.

How deep tokens are read is data on the device, so one graph serves all precisions, and the dial may be turned between
replays.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mobiq_lightning.nn import RoutedExperts

CACHE_NAMES = ("cache", "past_key_values")
"""Names that transformers gives the key-value cache: since 5.24, and before."""


class GraphedStep:
    """Stands in for a model's forward pass while a sequence with a static cache is continued.

    The first step with inputs of some shape runs as usual, so that everything is compiled and allocated; the second is
    captured; it and all later ones are replayed with their inputs copied to where the first ones were. A captured step holds
    the cache that it was captured with. It starts anew with another cache, with other shapes, and when the dial has
    replaced counters or thresholds.

    The next step overwrites the output of the last. On a device without graphs, and for a model with experts, of which each
    token needs others, each step is run on the copied inputs.

    Args:
        model: A causal language model of transformers, elastic or not.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.captures = 0
        self._key: Any = None
        self._cache: Any = None
        self._static: list[Any] = []
        self._output: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured = False
        self._varies = any(isinstance(module, RoutedExperts) for module in model.modules())

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        """Computes the model's output for one step.

        Args:
            **inputs: Keyword arguments of the model's forward, among them a static key-value cache.
        """
        name = next(name for name in CACHE_NAMES if name in inputs)
        cache = inputs.pop(name)
        leaves, form = tree_flatten(inputs)
        key = (str(form), [_kind(leaf) for leaf in leaves], getattr(self._dial, "replaced", 0))
        if key != self._key or cache is not self._cache:
            self._key, self._cache, self._captured = key, cache, False
            self._graph = self._output = None
            self._static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return self.model(**inputs, **{name: cache})
        for static, leaf in zip(self._static, leaves, strict=True):
            if isinstance(leaf, Tensor):
                static.copy_(leaf)
        if not self._captured:
            self._capture({**tree_unflatten(self._static, form), name: cache})
        if self._graph is None:
            return self.model(**tree_unflatten(self._static, form), **{name: cache})
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self._output

    @property
    def _dial(self) -> Any:
        return getattr(self.model, "dial", None)

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def _capture(self, inputs: dict[str, Any]) -> None:
        self._captured, self.captures = True, self.captures + 1
        if self._device.type != "cuda" or self._varies:
            return
        # Nothing runs while it is captured, so the cache and the counters stay as they are.
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(self._graph):
            self._output = self.model(**inputs)


def cache_name(model: Any) -> str:
    """Gives the name of the argument of a model's forward that takes the key-value cache."""
    parameters = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_NAMES if name in parameters)


def _kind(leaf: Any) -> Any:
    """Key that must not change between replays: shape, dtype and device of a tensor, the value of anything else."""
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
