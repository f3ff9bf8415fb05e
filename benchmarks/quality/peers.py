# python -m benchmarks.quality.peers --to runs/peers
"""Other ways to quantize beside ours: same checkpoint, calibration tokens, group size and perplexity code.

Every row is written as soon as it is measured; the same command goes on where a killed one stopped. Peers are packages that
this project does not depend on: what is not installed, or fails, is named in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobiq_lightning.console import say
from mobiq_lightning.environment import environment
from mobiq_lightning.files import write_atomically, write_json

from .figure import plot
from .peer import Peer
from .protocol import Protocol, measure_quality
from .registry import PEERS
from .rows import DONE, FAILED, FULL, MISSING, Cell, Journal, plan
from .summary import elastic_means, means, read_elastic, verdicts
from .table import print_peers

ROOT = Path(__file__).parents[2]


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    default = Protocol()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.peers", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default=default.model, help="local folder, hub id or builtin")
    parser.add_argument("--source", default=default.source, help="calibration text, as data.source of a recipe")
    parser.add_argument("--eval_source", default=default.eval_source, help="evaluation text")
    for name in ("n_samples", "seq_len", "eval_seq_len", "n_generated"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    parser.add_argument("--eval_protocol", choices=("documents", "packed"), default=default.eval_protocol)
    parser.add_argument("--eval_max_windows", default=str(default.eval_max_windows), help="a number, or null for all")
    for name, value in (("bits", "2,3,4"), ("group_sizes", "64"), ("seeds", "0")):
        parser.add_argument(f"--{name}", type=numbers, default=numbers(value), help=f"as in {value}")
    parser.add_argument(
        "--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="NAME", help="only these"
    )
    parser.add_argument(
        "--python", nargs="+", default=[], metavar="PACKAGE=PATH", help="peers of a package run in this Python"
    )
    parser.add_argument(
        "--elastic", nargs="+", type=Path, default=[], help="run folders of our own, for table and plot"
    )
    parser.add_argument("--again", action="store_true", help="tries again what failed")
    parser.add_argument("--to", type=Path, required=True, help="folder for rows.jsonl, peers.json and peers.png")
    return parser.parse_args(given)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def protocol_of(given: argparse.Namespace) -> Protocol:
    def absolute(name: str) -> str:
        return str(Path(name).resolve()) if Path(name).exists() else name

    windows = None if given.eval_max_windows in ("null", "None") else int(given.eval_max_windows)
    model, source, eval_source = map(absolute, (given.model, given.source, given.eval_source))
    lengths = (given.n_samples, given.seq_len, given.eval_seq_len)
    return Protocol(model, source, eval_source, *lengths, windows, given.n_generated, given.eval_protocol)


def measure_full(journal: Journal, protocol: Protocol) -> dict[str, Any]:
    """Full precision and the protocol in words; measured once per folder."""
    path = journal.folder / "full.json"
    if not path.is_file():
        source = protocol.load()
        data = protocol.read(source, 0)
        perplexity, _ = measure_quality(source.model, data, source.model)
        write_json(path, {"perplexity": perplexity, "weights": source.fingerprint, "protocol": data.protocol.to_json()})
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def run_peer(peer: Peer, cells: list[Cell], journal: Journal, protocol: Protocol, python: str) -> None:
    """Measures the cells in a process of the peer's own; one that ends early costs the row it was at, no more."""
    log = journal.folder / "logs" / f"{peer.name.replace(' ', '-').replace('/', '-')}.log"
    log.parent.mkdir(exist_ok=True)
    left = cells
    while left:
        say(f"{peer.name}: {len(left)} rows")
        job = {
            "folder": str(journal.folder.resolve()),
            "protocol": asdict(protocol),
            "cells": [asdict(c) for c in left],
        }
        with log.open("a", encoding="utf-8") as file:
            done = subprocess.run(
                [python, "-m", f"{__package__}.worker"], input=json.dumps(job), text=True, cwd=ROOT, check=False,
                stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1", **dict(peer.variables)},
            )  # fmt: skip
        rows = {Cell.of(row): row for row in journal.rows()}
        remaining = [cell for cell in left if cell not in rows]
        if any(row["status"] == MISSING for cell, row in rows.items() if cell in left):
            return
        if remaining and remaining[0] not in rows:
            journal.add(broken_row(peer, remaining[0], done.returncode, log))
            remaining = remaining[1:]
        left = remaining


def broken_row(peer: Peer, cell: Cell, code: int, log: Path) -> dict[str, Any]:
    """The row of a cell whose process ended without one."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    error = f"its process ended with exit code {code}: {lines[-1][-300:] if lines else 'no output'}"
    return {**asdict(cell), "setting": peer.setting, "ours": peer.ours, "status": FAILED, "error": error}


def interpreter(peer: Peer, given: Sequence[str]) -> str:
    """The Python that a peer is installed in; by default this one."""
    table = dict(pair.split("=", 1) for pair in given)
    return str(table.get(peer.package or "", sys.executable))


def collect(given: argparse.Namespace, journal: Journal, full: dict[str, Any]) -> dict[str, Any]:
    """All that peers.json holds."""
    order = list(PEERS)
    rows = [row for row in journal.rows() if row["peer"] in PEERS]
    rows.sort(key=lambda row: (order.index(row["peer"]), row["group_size"], row["bits"], row["seed"] or 0))
    elastic = [row for folder in given.elastic for row in read_elastic(folder, full["protocol"]["data_hash"])]
    averaged, ours = means(rows), elastic_means(elastic)
    group_sizes = sorted({row["group_size"] for row in rows})
    bits = sorted({row["bits"] for row in rows})
    return {
        "model": Path(given.model).name,
        "protocol": without_folders(full["protocol"]),
        "environment": environment(),
        FULL: full["perplexity"],
        "verdicts": verdicts(averaged, ours, bits, group_sizes),
        "not_offered": {name: [b for b in bits if b not in PEERS[name].bits] for name in order},
        "means": averaged,
        "elastic": ours,
        "rows": rows,
        "elastic_rows": elastic,
    }


def without_folders(protocol: dict[str, Any]) -> dict[str, Any]:
    """Texts by their name: where they lie is nobody's business but this machine's."""
    calibration = protocol["calibration"]
    named = {**calibration, "data": Path(calibration["data"]).name}
    del named["seed"]  # every row has its own
    return {**protocol, "data": Path(protocol["data"]).name, "calibration": named}


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments(argv)
    protocol, journal = protocol_of(given), Journal(given.to)
    journal.claim(protocol)
    full = measure_full(journal, protocol)
    for peer in (PEERS[name] for name in given.peers):
        cells = journal.pending(plan(peer, given.bits, given.group_sizes, given.seeds), given.again)
        run_peer(peer, cells, journal, protocol, interpreter(peer, given.python))
    found = collect(given, journal, full)
    write_json(given.to / "peers.json", found)
    if any(row["status"] == DONE for row in found["rows"]):
        write_atomically(given.to / "peers.png", lambda path: plot(found, path))
    print_peers(found)
    say(f"peers.json and peers.png are in {given.to}.")


if __name__ == "__main__":
    main()
