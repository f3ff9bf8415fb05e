"""Callbacks: one per file."""

from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.callbacks.block_export import BlockExport
from mobiq_lightning.callbacks.block_store import BlockStore
from mobiq_lightning.callbacks.guards import Guards
from mobiq_lightning.callbacks.latency_check import LatencyCheck
from mobiq_lightning.callbacks.layer_gains import LayerGains
from mobiq_lightning.callbacks.layerwise_calibration import LayerwiseCalibration
from mobiq_lightning.callbacks.outlier_migration import OutlierMigration
from mobiq_lightning.callbacks.progress import CalibrationProgress
from mobiq_lightning.callbacks.results import Results
from mobiq_lightning.callbacks.routing_diagnostics import RoutingDiagnostics
from mobiq_lightning.callbacks.threshold_tuning import ThresholdTuning

__all__ = [
    "BlockExport",
    "BlockStore",
    "CalibrationCallback",
    "CalibrationProgress",
    "Guards",
    "LatencyCheck",
    "LayerGains",
    "LayerwiseCalibration",
    "OutlierMigration",
    "Results",
    "RoutingDiagnostics",
    "ThresholdTuning",
]
