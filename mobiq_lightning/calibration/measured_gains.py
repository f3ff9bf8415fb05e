"""Layer gains of a calibrated model by probes and by gradients: shared out among processes, counted by the clock, and kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mobiq_lightning.calibration.device_memory import measuring_bytes, whole_model_on_device
from mobiq_lightning.calibration.hidden_states import eval_mode
from mobiq_lightning.calibration.kept_gains import KeptGains
from mobiq_lightning.calibration.planning import GainsPlan, gradient_steps
from mobiq_lightning.calibration.ranks import everywhere, gather_windows, share_of_windows, summed_over_ranks
from mobiq_lightning.calibration.squared_gradients import gradient_gains
from mobiq_lightning.calibration.stage_training import unchanged_weights
from mobiq_lightning.evaluation import TokenView, token_gains, token_views
from mobiq_lightning.runs import LAYER_GAINS_SO_FAR, GainMethod

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration

GAINS_PHASE = "layer gains"
"""Name of the phase of a run in which they are measured."""


class DoesNotFitError(Exception):
    """The whole model does not fit on the device; the text is a clause that says so."""


@dataclass
class MeasuredGains:
    """What was measured, and how.

    Args:
        plan: Methods and windows, as it was done.
        input_ids: (N, T) windows of all processes.
        reference_bits: One depth, in bits, that all other inputs read while one is probed; None for the depth that a slice
            reaches.
        batch_size: Windows per forward pass of a probe.
        gains: By method, (I, S - 1) in nats per token.
        tokens: (I, S - 1, N * T) of each token, if there were probes.
        views: What routers see of these tokens.
    """

    plan: GainsPlan
    input_ids: Tensor
    reference_bits: int | None
    batch_size: int
    gains: dict[GainMethod, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    views: Sequence[TokenView] = ()


def probe_gains(module: ElasticCalibration, found: MeasuredGains) -> None:
    """Measures by probes of the whole model.

    Raises:
        DoesNotFitError: If it does not fit on the device.
    """
    model, inputs, ids = module.sliced.source.model, module.sliced.all_inputs(), found.input_ids.to(module.device)
    needed = measuring_bytes(module, ids.shape[1], found.batch_size, gradients=False)
    with whole_model_on_device(module, needed) as shortage:
        if shortages := [one for one in everywhere(shortage) if one is not None]:
            raise DoesNotFitError(shortages[0])
        own, kept = share_of_windows(module, ids), _kept(module, "probes", found)
        with _counted(module, int(kept.tensors.get("probes", torch.tensor(0)))):
            with unchanged_weights(module, module.sliced.calibrated_blocks(), 4):
                how = (found.reference_bits, found.batch_size, kept.tensors, kept.save)
                gains = token_gains(model, inputs, own, *how).unflatten(-1, own.shape)
                found.tokens = gather_windows(module, [gains], len(ids), -2)[0].flatten(-2)
            found.views = _views(module, found, ids)
    found.gains["probes"] = found.tokens.double().mean(-1)


def take_gradient_gains(module: ElasticCalibration, found: MeasuredGains) -> None:
    """Measures by squared gradients, a block at a time."""
    ids, steps, kept = found.input_ids, gradient_steps(module.sizes), _kept(module, "gradients", found)
    if len(set(map(tuple, everywhere(sorted(kept.tensors))))) > 1:  # killed between two writes: all go back together
        kept.tensors.clear()
    module.clock.restart()
    found.gains["gradients"] = gradient_gains(
        module.sliced.caller,
        [block.readers for block in module.sliced.calibrated_blocks()],
        share_of_windows(module, ids),
        kept,
        lambda done: module.clock.step(GAINS_PHASE, done, steps),
        ids.shape[0] * (ids.shape[1] - 1),
        lambda squares: summed_over_ranks(module, squares, len(ids)),
    )
    module.end_hidden_states()


def _kept(module: ElasticCalibration, method: GainMethod, found: MeasuredGains) -> KeptGains:
    """What an earlier process of this run has measured by a method."""
    trainer = module.trainer
    key = {
        "method": method,
        "windows": found.plan.windows,
        "reference_bits": found.reference_bits,
        "batch_size": found.batch_size,
        "text": module.text.calibration_digest,
        "inputs": module.sliced.input_names(),
        "ranks": trainer.world_size,
    }
    return KeptGains(module.run_folder / LAYER_GAINS_SO_FAR / f"{method}-{trainer.global_rank}.safetensors", key)


def _views(module: ElasticCalibration, found: MeasuredGains, input_ids: Tensor) -> list[TokenView]:
    """What routers see of the tokens that were probed, at the middle depth unless there is one for all probes."""
    blocks = module.sliced.calibrated_blocks()
    depths = module.sliced.all_inputs()[0].depths
    bits = found.reference_bits or depths[len(depths) // 2]
    with eval_mode([router for block in blocks for router in block.routers()]):
        return token_views(module.sliced.source.model, blocks, input_ids, bits, found.batch_size)


@contextmanager
def _counted(module: ElasticCalibration, done: int) -> Iterator[None]:
    """Within it, the clock of the run counts passes through the model, after those that were done before."""
    clock = module.clock
    clock.skip(GAINS_PHASE, done, max(done, clock.left.steps(GAINS_PHASE)))

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        clock.step(GAINS_PHASE, done, max(done, clock.left.steps(GAINS_PHASE)))

    handle = module.sliced.source.model.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()
