"""The base of this package's callbacks: hooks that receive an `ElasticCalibration`, in an order that is said."""

from __future__ import annotations

from typing import ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from mobiq_lightning.calibration import ElasticCalibration


class CalibrationCallback(Callback):
    """A Lightning callback that works on an `ElasticCalibration`, and on no other module.

    Hooks are Lightning's own, with the same names and arguments; only the module that they receive has a narrower type. That
    it has this type is looked at once, in `setup`, which Lightning calls before all other hooks.
    """

    order: ClassVar[int] = 0
    """Callbacks with a lower number run earlier in each hook; those with the same one in the order of the recipe, those of
    the recipe before those that every run has. Callbacks of other packages have 0."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes sure that the module is an `ElasticCalibration`.

        Raises:
            TypeError: If it is another.
        """
        if not isinstance(pl_module, ElasticCalibration):
            raise TypeError(
                f"the callback {type(self).__name__} works on ElasticCalibration, not on {type(pl_module).__name__}; "
                "take it out of the trainer's callbacks, or calibrate with ElasticCalibration"
            )
        super().setup(trainer, pl_module, stage)
