"""The elastic checkpoint: writing it block by block, reading it through transformers, checking and describing it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobiq_lightning.checkpoint.loading import load
    from mobiq_lightning.checkpoint.verification import verify

__all__ = ["load", "verify"]


def __getattr__(name: str) -> Any:
    # On demand: the quantizer beside them is imported while transformers itself still is.
    if name == "load":
        from mobiq_lightning.checkpoint.loading import load

        return load
    if name == "verify":
        from mobiq_lightning.checkpoint.verification import verify

        return verify
    raise AttributeError(name)
