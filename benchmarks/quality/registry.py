"""All peers, in the order of the tables."""

from __future__ import annotations

from .peer import Peer
from .wrappers import (
    clipping,
    rounding,
    with_auto_round,
    with_gptqmodel,
    with_llmcompressor,
    with_neural_compressor,
    with_quark,
    without_calibration,
)

_MODULES = (
    rounding,
    clipping,
    without_calibration,
    with_gptqmodel,
    with_llmcompressor,
    with_neural_compressor,
    with_quark,
    with_auto_round,
)

PEERS: dict[str, Peer] = {peer.name: peer for module in _MODULES for peer in module.PEERS}
