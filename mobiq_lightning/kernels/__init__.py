"""Products with sliced weights. The public function is `sliced_linear`; the reference defines what is correct."""

from mobiq_lightning.kernels.reference import mixed_depth_product, sliced_linear

__all__ = ["mixed_depth_product", "sliced_linear"]
