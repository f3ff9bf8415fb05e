"""Elastic quantization of language models: one checkpoint that runs at any average bit-width from 2 to 8.

Importing this package makes `transformers.AutoModelForCausalLM.from_pretrained` know elastic checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mobiq_lightning.registration import register_with_transformers

if TYPE_CHECKING:
    from mobiq_lightning.checkpoint import load, verify
    from mobiq_lightning.policy import BitsPolicy

__version__ = "0.1.0"
__all__ = ["BitsPolicy", "__version__", "load", "verify"]

register_with_transformers()


def __getattr__(name: str) -> Any:
    # On demand: the command line answers a typo before PyTorch is imported.
    if name in ("load", "verify"):
        from mobiq_lightning import checkpoint

        return getattr(checkpoint, name)
    if name == "BitsPolicy":
        from mobiq_lightning.policy import BitsPolicy

        return BitsPolicy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
