"""The journal: a line per row as soon as it is measured, so that a kill loses nothing and the same command goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobiq_lightning.files import write_json

from .peer import Peer
from .protocol import Protocol

JOURNAL, PROTOCOL = "rows.jsonl", "protocol.json"
DONE, FAILED, MISSING, NOT_OFFERED = "done", "failed", "not installed", "not offered"
FULL = "full precision"


@dataclass(frozen=True)
class Cell:
    """What one row measures.

    Args:
        peer: Its name.
        bits: Per weight.
        group_size: Columns per range.
        seed: None where the peer does not look at calibration tokens.
    """

    peer: str
    bits: int
    group_size: int
    seed: int | None

    @classmethod
    def of(cls, row: dict[str, Any]) -> Cell:
        return cls(row["peer"], row["bits"], row["group_size"], row["seed"])


def plan(peer: Peer, bits: Iterable[int], group_sizes: Iterable[int], seeds: Iterable[int]) -> list[Cell]:
    """The cells of a peer, those of the first seed and group size first."""
    offered = [b for b in bits if b in peer.bits]
    return [
        Cell(peer.name, b, g, s) for s in (seeds if peer.calibrated else [None]) for g in group_sizes for b in offered
    ]


class Journal:
    """The rows of a folder.

    Args:
        folder: Of one model and text.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / JOURNAL

    def claim(self, protocol: Protocol) -> None:
        """Makes the folder that of a protocol.

        Raises:
            ValueError: If it holds rows of another one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / PROTOCOL
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            changed = [key for key, value in protocol.as_dict().items() if found.get(key) != value]
            if changed:
                described = ", ".join(f"{key} {found.get(key)} instead of {protocol.as_dict()[key]}" for key in changed)
                raise ValueError(f"{self.folder} holds rows with {described}. Give another folder with --to")
        write_json(path, protocol.as_dict())

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row, on a line of its own even after one that a kill cut short."""
        cut = self.path.is_file() and self.path.stat().st_size > 0 and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut + json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The last row of every cell. A line that a kill cut short is left out."""
        last: dict[Cell, dict[str, Any]] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                last[Cell.of(row)] = row
        return list(last.values())

    def pending(self, cells: Iterable[Cell], again: bool = False) -> list[Cell]:
        """Those without a row. What was not installed is always tried again, what failed if `again` says so."""
        retried = (MISSING, FAILED) if again else (MISSING,)
        finished = {Cell.of(row) for row in self.rows() if row["status"] not in retried}
        return [cell for cell in cells if cell not in finished]
