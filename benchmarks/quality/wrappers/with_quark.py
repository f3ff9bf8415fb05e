"""GPTQ, AWQ, GPTAQ and Qronos of AMD Quark."""

from __future__ import annotations

from ..peer import Peer

PEERS: list[Peer] = []
