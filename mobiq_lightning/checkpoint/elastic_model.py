"""What an elastic model can do beside what transformers gives it: turn its dial, and tell what it used."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from mobiq_lightning.dial import BitsUsed, Budget, Dial
from mobiq_lightning.layers import routed_inputs, stored_bits
from mobiq_lightning.routed_input import RoutedInput
from mobiq_lightning.strategies.thresholds import Scope


class ElasticModel:
    """Mixed into the class of a causal language model when an elastic checkpoint is loaded into it."""

    dial: Dial

    def set_bits(self, bits: Budget, scope: Scope | None = None) -> None:
        """Runs at `bits` bits per weight on average from now on; takes effect with the next token.

        Args:
            bits: One figure, or (B,), one for each row of the batches to come.
            scope: ``layer`` or ``global``: another threshold table than the checkpoint's default.

        Raises:
            BitsError: If a budget is outside of what the loaded planes can give.
        """
        self.dial.set_bits(bits, scope)

    def bits(self, bits: Budget, scope: Scope | None = None) -> AbstractContextManager[None]:
        """Within it, the model runs at `bits`; afterwards as before. See `set_bits`."""
        return self.dial.bits(bits, scope)

    @property
    def budget(self) -> float | Tensor | None:
        """The bits that are asked for at present; what was used, `bits_used` tells."""
        return self.dial.budget

    def bits_used(self, per_layer: bool = False) -> BitsUsed:
        """What the model has read, measured: since `set_bits`, or by the last `generate` or `with model.bits(...)`.

        Args:
            per_layer: Also report every input, under the name of the first linear that reads it.

        Raises:
            BitsError: If it has read nothing since.
        """
        return self.dial.bits_used(input_names(self) if per_layer else ())

    def generate(self, *args: Any, bits: Budget | None = None, **kwargs: Any) -> Any:
        """`generate` of transformers, at `bits` bits per weight.

        The dial may be turned between tokens, say by a logits processor that calls `set_bits`; the KV cache is kept.

        Args:
            *args: As transformers takes them.
            bits: Budget of this call, one figure or one for each row of the batch; by default where the dial stands.
            **kwargs: As transformers takes them.

        Raises:
            BitsError: If a budget is out of range, or budgets are not as many as rows.
        """
        given = (args[0] if args else None, *(kwargs.get(k) for k in ("inputs", "input_ids", "inputs_embeds")))
        batch = next((len(value) for value in given if isinstance(value, Tensor)), 1)
        with self.dial.generation(bits, batch):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as its plain class and this one, since the class that joins them is made at run time."""
        reduced: Any = super().__reduce_ex__(2)
        return (_rebuild, (type(self).__mro__[2],), *reduced[2:])


def make_elastic(model: Any, scope: Scope, bits: float) -> None:
    """Makes a model whose linears are elastic an `ElasticModel`, in place.

    Args:
        model: A causal language model of transformers, loaded.
        scope: Its default threshold table.
        bits: Where its dial stands; the nearest that it holds.
    """
    inputs = routed_inputs(model)
    model.__class__ = elastic_class(type(model))  # type: ignore[arg-type]
    model.dial = Dial(inputs, scope, *stored_bits(model))
    model.dial.set_bits(min(max(bits, model.dial.lowest), model.dial.highest))
    model.register_forward_pre_hook(_note_padding, with_kwargs=True)


@functools.cache
def elastic_class(cls: Any) -> Any:
    """`cls` with `ElasticModel` in front, under the same name, so that saved configs name what transformers knows."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (ElasticModel, cls), names)


def input_names(model: Any) -> list[str]:
    """Names of a model's routed inputs, in order: the first linear that reads each."""
    return [name.removesuffix(".input") for name, module in model.named_modules() if isinstance(module, RoutedInput)]


def _note_padding(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Lets the counts leave out what a 2-D attention mask marks as padding."""
    mask: Any = kwargs.get("attention_mask")
    tokens: Any = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    padded = isinstance(mask, Tensor) and mask.ndim == 2 and isinstance(tokens, Tensor)
    model.dial.state.mask = mask[:, -tokens.shape[1] :] if padded else None


def _rebuild(cls: type) -> Any:
    elastic = elastic_class(cls)
    return elastic.__new__(elastic)
