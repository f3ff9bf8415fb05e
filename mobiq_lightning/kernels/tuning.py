"""How kernels divide their work: a table for each kind of GPU, shipped with the package, and a default for all others.

Nothing is tuned while a model runs: the first call of a shape would be slow, and a captured graph would hold whatever was
tried last. ``python -m mobiq_lightning latency --tune`` measures and writes the table of the GPU that it runs on.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mobiq_lightning.errors import FileError, KernelError
from mobiq_lightning.input_files import read_mapping

TUNED_FOLDER = "MOBIQ_TUNED"
"""Environment variable: a folder whose tables are looked up before those of the package."""


@dataclass(frozen=True)
class DecodeConfig:
    """How a product of up to 64 tokens is divided.

    Args:
        block_rows: Rows of a program: 64 or 128.
        tiles_per_iteration: Tiles of 128 columns that a program reads at once: 1 or 2.
        stages: Stages of the software pipeline.
        programs_per_processor: Programs per streaming multiprocessor that columns are split for.
    """

    block_rows: int = 128
    tiles_per_iteration: int = 1
    stages: int = 4
    programs_per_processor: int = 6


@dataclass(frozen=True)
class Table:
    """What is known of one kind of GPU.

    Args:
        decode: By ``"tokens"`` or ``"tokens:rows:columns"``; tokens are 8, 16, 32 or 64.
        grouped_until: Tokens up to which the grouped product is used; with more, weights are dequantized.
        source: Where the table comes from.
    """

    decode: Mapping[str, DecodeConfig]
    grouped_until: int
    source: str

    def decode_config(self, columns: int, rows: int, in_features: int) -> DecodeConfig:
        """The configuration for a product: that of its shape, or that of its number of tokens.

        Args:
            columns: Columns of the tensor core's product: 8, 16, 32 or 64.
            rows: Padded rows of the weights.
            in_features: Columns of the weights.
        """
        exact = self.decode.get(f"{columns}:{rows}:{in_features}")
        return exact or self.decode[str(columns)]


@functools.cache
def table_for(device_name: str) -> Table:
    """The table of a kind of GPU, else the default one; `Table.source` says which.

    Args:
        device_name: As `torch.cuda.get_device_name` tells it.
    """
    name = f"{file_name(device_name)}.json"
    folder = os.environ.get(TUNED_FOLDER)
    if folder and (Path(folder) / name).is_file():
        return _tuned(Path(folder) / name)
    shipped = resources.files("mobiq_lightning.kernels") / "tuned"
    found = shipped / name
    if not found.is_file():
        found = shipped / "default.json"
    return _table(json.loads(found.read_text(encoding="utf-8")), found.name)


def file_name(device_name: str) -> str:
    """Name of a table's file without its ending: ``NVIDIA H200`` becomes ``nvidia-h200``."""
    return "-".join(device_name.lower().split())


def table_json(decode: Mapping[str, DecodeConfig], grouped_until: int, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What a table's file holds.

    Args:
        decode: Configurations by key.
        grouped_until: Tokens up to which the grouped product is used.
        measured: Machine, versions and date of the measurement.
    """
    return {
        "measured": dict(measured),
        "grouped_until": grouped_until,
        "decode": {key: asdict(value) for key, value in decode.items()},
    }


def _tuned(path: Path) -> Table:
    """The table in a file that `latency --tune` has written."""
    try:
        return _table(read_mapping(path), str(path))
    except (FileError, KeyError, TypeError, AttributeError) as error:
        raise KernelError(
            f"{path} is no table of `latency --tune` ({error}); tune again, or unset {TUNED_FOLDER}"
        ) from error


def _table(stored: dict[str, Any], source: str) -> Table:
    decode = {key: DecodeConfig(**value) for key, value in stored["decode"].items()}
    return Table(decode, stored["grouped_until"], source)
