"""Learned clipping at one depth, as OmniQuant has it: our own slices, calibrated for that depth alone, without a router."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from ..peer import Peer, Task, set_weight

# The code is nested: at 2 bits the second slice is never read, but a model has to have two to mix.
SLICES = {2: [2, 1], 3: [2, 1], 4: [2, 1, 1]}
EPOCHS = 10


def recipe(task: Task) -> dict[str, Any]:
    """Ranges of nested codes learned for all of the epochs, at the one depth."""
    protocol, bits = task.protocol, task.bits
    strategies = "mobiq_lightning.strategies."
    slices = {"slice_bits": SLICES[bits], "group_size": task.group_size}
    return {
        "seed_everything": task.seed,
        "model": {
            "pretrained": protocol.model,
            "dtype": "float32",
            "slices": {"class_path": f"{strategies}ResidualSlices", "init_args": slices},
            "router": {"class_path": f"{strategies}StaticRouter"},
            "budget": {"class_path": f"{strategies}ConstantBudget", "init_args": {"bits": float(bits)}},
            "objective": {
                "class_path": f"{strategies}BlockReconstruction",
                "init_args": {"depth_weights": {bits: 1.0}},
            },
            "epochs_per_block": EPOCHS,
            "stages": [{"share": 1.0, "train": ["ranges"]}],
            "rates": {"ranges": 2e-2},
            "eval_bits": [float(bits)],
            "random_seeds": [0],
        },
        "data": {
            "source": protocol.source,
            "eval_source": protocol.eval_source,
            "n_samples": protocol.n_samples,
            "n_generated": protocol.n_generated,
            "seq_len": protocol.seq_len,
            "batch_size": 8,
            "eval_protocol": "documents",
            "eval_seq_len": protocol.eval_seq_len,
            "eval_batch_size": 16,
            "eval_max_windows": 16,  # of the run's own comparison, which nobody reads
            "seed": task.seed,
        },
        "trainer": {
            "default_root_dir": str(task.scratch / "run"),
            "accelerator": "cpu",
            "callbacks": [{"class_path": "mobiq_lightning.callbacks.LatencyCheck", "init_args": {"seconds": 0.0}}],
        },
    }


def run(task: Task) -> Any:
    import mobiq_lightning

    with contextlib.redirect_stdout(io.StringIO()):
        made = mobiq_lightning.fit(recipe(task))
    calibrated: Any = mobiq_lightning.load(made.path, device="cpu")
    for name, linear in task.linears():
        set_weight(linear, calibrated.get_submodule(name).weight_at(task.bits))
    return task.model


PEERS = [
    Peer(
        "LWC (ours, static)",
        run,
        None,
        f"ResidualSlices, ranges alone, one depth, {EPOCHS} epochs",
        bits=tuple(SLICES),
        ours=True,
    )
]
