"""Products with sliced weights. One public function, `sliced_linear`; the reference defines what is correct."""

from mobiq_lightning.kernels.reference import sliced_linear

__all__ = ["sliced_linear"]
