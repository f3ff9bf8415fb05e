"""Nothing is changed before slicing."""

from mobiq_lightning.strategies.transform_base import Transform


class NoTransform(Transform):
    """Weights are sliced as the source model has them."""
