"""Tokens as the products want them, in the order and scale that fit how weights are unpacked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """In which order and scale tokens are prepared.

    Args:
        dtype: dtype of the prepared tokens.
        codes_are_subnormal: Whether codes are used as subnormal numbers of that dtype instead of being converted to it.
        mma_sync_order: Whether columns are in the order that ``mma.sync`` wants, instead of that of ``wgmma``.
    """

    dtype: torch.dtype
    codes_are_subnormal: bool
    mma_sync_order: bool

    @classmethod
    def of(cls, tokens: int, dtype: torch.dtype, capability: tuple[int, int], interpreted: bool) -> Form:
        """The form that the product of some tokens wants.

        Args:
            tokens: Number of tokens. Up to 8 are multiplied by ``mma.sync`` with eight columns, more by ``wgmma`` where
                there is one.
            dtype: dtype of the tokens.
            capability: Compute capability of the device.
            interpreted: Whether Triton's interpreter runs the kernels. It multiplies the bits of bfloat16 as integers, so
                float32 is used there.
        """
        mma_sync = tokens <= 8 or capability < (9, 0)
        return cls(torch.float32, False, mma_sync) if interpreted else cls(dtype, True, mma_sync)

    @property
    def scale(self) -> float:
        """Factor of the prepared tokens: bfloat16 codes are worth 2^-133, too little for a product in range."""
        return 2.0**100 if self.codes_are_subnormal and self.dtype == torch.bfloat16 else 1.0

    @property
    def unscale(self) -> float:
        """Factor of the sums of products that makes codes worth what they are."""
        if not self.codes_are_subnormal:
            return 1.0
        return 2.0**33 if self.dtype == torch.bfloat16 else 2.0**24


@dataclass(frozen=True)
class Prepared:
    """Tokens as the products want them.

    Args:
        one: (M, T * 128), each column times ``4 ** -(column / 8 % 4)``: for one unit at a time.
        two: (M, T * 128), each column times ``16 ** -(column / 16 % 2)``: for two units at a time.
        sums: (T * 128 / step, M) float32, sums over each step of columns.
        bits: (M,) int32, the depth of each token.
        info: (3,) int32: lowest and highest depth, and a mask of units of which a token reads the upper bit alone.
        form: Order and scale.
        dtype: dtype of the tokens as they were given.
    """

    one: Tensor
    two: Tensor
    sums: Tensor
    bits: Tensor
    info: Tensor
    form: Form
    dtype: torch.dtype
