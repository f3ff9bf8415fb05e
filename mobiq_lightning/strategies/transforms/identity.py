"""Nothing is changed before slicing."""

from mobiq_lightning.strategies.transform_base import Transform


class NoTransform(Transform):
    """Changes nothing: weights are sliced as the source model has them.

    Example:
        ``transform: {class_path: NoTransform}``
    """
