"""Measures, once everything is calibrated, what each slice of each input gains the whole model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from mobiq_lightning.calibration import (
    ElasticCalibration,
    eval_mode,
    measuring_bytes,
    unchanged_weights,
    whole_model_on_device,
)
from mobiq_lightning.calibration.planning import FORWARD, ModelSizes, Phase, StepTimes
from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.console import say
from mobiq_lightning.errors import ModelError, RecipeError
from mobiq_lightning.evaluation import (
    TokenView,
    gradient_gains,
    rows_of,
    token_gains,
    token_rows,
    token_summary,
    token_views,
)
from mobiq_lightning.files import write_json
from mobiq_lightning.runs import LAYER_GAINS, UNIT, GainMethod, GainsSummary, LayerGainRow, LayerGainsFile, MethodGains
from mobiq_lightning.sources import TextWindows
from mobiq_lightning.strategies import ObservesGains

PHASE = "layer gains"


class LayerGains(CalibrationCallback):
    """Leaves layer_gains.json in the run folder, and shows routers that ask for it what their slices gain.

    The comparison takes its static layers of greatest gain from the file. It comes before `ThresholdTuning`, which asks the
    routers.

    Args:
        windows: Calibration windows to measure on, the first ones; 0 measures nothing.
        methods: `probes` (of which the comparison makes its best layers) or `gradients`, beside what the router asks for.
        reference_bits: One depth, in bits, that all other inputs read while one is probed; by default the depth that the
            slice in question reaches.
        batch_size: Windows per forward pass of a probe.
    """

    order = -10  # thresholds are tuned with what routers are shown here

    def __init__(
        self,
        windows: int = 8,
        methods: list[GainMethod] | None = None,
        reference_bits: int | None = None,
        batch_size: int = 4,
    ) -> None:
        if windows < 0 or batch_size < 1:
            raise RecipeError(
                f"LayerGains: windows ({windows}) must be 0 or more, batch_size ({batch_size}) at least 1"
            )
        self.windows, self.batch_size, self.reference_bits = windows, batch_size, reference_bits
        self.methods: list[GainMethod] = ["probes"] if methods is None else methods

    def phases(self, sizes: ModelSizes, text: TextWindows, times: StepTimes) -> list[Phase]:
        """Passes of each batch through the whole model: for probes one for each input and slice, and one for each depth."""
        if not self.windows or "probes" not in self.methods:
            return []
        batches = -(-min(self.windows, text.n_windows) // self.batch_size)
        passes = (sizes.n_inputs + 1) * (len(sizes.slice_bits) - 1) + 1
        return [Phase(PHASE, FORWARD, batches * passes, times.gains)]

    def on_fit_start(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Refuses what would fail after hours of calibration."""
        routed = module.sliced.all_inputs()[0]
        if self.reference_bits is not None and self.reference_bits not in routed.depths:
            raise RecipeError(
                f"LayerGains: reference_bits ({self.reference_bits}) is no prefix of the slices; give one of "
                f"{list(routed.depths)}"
            )
        if isinstance(routed.router, ObservesGains) and not self.windows:
            raise RecipeError(
                f"LayerGains: windows is 0, but {type(routed.router).__name__} scores layers by what is measured on them"
            )

    def on_train_epoch_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Measures after the last epoch, before thresholds are tuned and the checkpoint is written."""
        if module.current_epoch + 1 == trainer.max_epochs:
            self.measure(module, module.text.calibration_ids()[: self.windows])

    def measure(self, module: ElasticCalibration, input_ids: Tensor) -> None:
        """Measures on windows (N, T), tells the routers and writes the file.

        Raises:
            ModelError: If the router needs what cannot be measured, since the whole model does not fit on the device.
        """
        inputs = module.sliced.all_inputs()
        first = inputs[0].router
        asked = first.gains_from if isinstance(first, ObservesGains) else None
        methods = list(dict.fromkeys([*self.methods, *([asked] if asked else [])]))
        path = module.run_folder / LAYER_GAINS
        if module.trainer.is_global_zero:
            path.unlink(missing_ok=True)
        if not self.windows or not methods:
            module.record.note_layer_gains("not measured: switched off")
            return
        needed = measuring_bytes(module, input_ids.shape[1], self.batch_size, "gradients" in methods)
        started = time.monotonic()
        with whole_model_on_device(module, needed) as shortage:
            if shortage is None:
                ids = input_ids.to(module.device)
                with _counted(module), unchanged_weights(module, module.sliced.calibrated_blocks()):
                    found = {method: self._measured(module, method, ids) for method in methods}
                views = self._views(module, ids) if "probes" in found else []
        if shortage is not None:
            missing = f"not measured: {shortage}"
            module.record.note_layer_gains(missing)
            if asked:
                raise ModelError(
                    f"{type(inputs[0].router).__name__} needs layer gains, {missing}. Everything before is kept"
                )
            say(f"Layer gains are {missing}; the comparison goes without best layers.")
            return
        tokens = found.get("probes")
        if tokens is not None:
            found["probes"] = tokens.double().mean(-1)
        if asked:
            for routed, gains in zip(inputs, found[asked], strict=True):
                assert isinstance(routed.router, ObservesGains)
                routed.router.observe_gains(gains, routed.slice_bits, routed.n_weights)
        self._write(module, found, input_ids, time.monotonic() - started, tokens, views)

    def _measured(self, module: ElasticCalibration, method: GainMethod, input_ids: Tensor) -> Tensor:
        """Gains (inputs, S - 1), nats per token; of probes (inputs, S - 1, tokens)."""
        model = module.sliced.source.model
        if method == "probes":
            return token_gains(model, module.sliced.all_inputs(), input_ids, self.reference_bits, self.batch_size)
        return gradient_gains(model, [block.readers for block in module.sliced.calibrated_blocks()], input_ids)

    def _views(self, module: ElasticCalibration, input_ids: Tensor) -> list[TokenView]:
        """What routers see of the tokens that were probed, at the middle depth unless there is one for all probes."""
        blocks = module.sliced.calibrated_blocks()
        depths = module.sliced.all_inputs()[0].depths
        bits = self.reference_bits or depths[len(depths) // 2]
        with eval_mode([router for block in blocks for router in block.routers()]):
            return token_views(module.sliced.source.model, blocks, input_ids, bits, self.batch_size)

    def _write(
        self,
        module: ElasticCalibration,
        found: dict[GainMethod, Tensor],
        ids: Tensor,
        seconds: float,
        tokens: Tensor | None,
        views: Sequence[TokenView],
    ) -> None:
        inputs, names = module.sliced.all_inputs(), module.sliced.input_names()
        rows = rows_of(found, names, [routed.n_weights for routed in inputs], inputs[0].slice_bits)
        reference_bits = self.reference_bits if "probes" in found else None
        methods, of_tokens = {method: _summary(rows, method) for method in found}, None
        if tokens is not None and rows:
            spread = token_rows(tokens, views, ids.shape[1])
            of_tokens = token_summary(tokens, spread, [row.bits * row.weights for row in rows])
            rows = [replace(row, tokens=one) for row, one in zip(rows, spread, strict=True)]
        summary = GainsSummary(
            windows=ids.shape[0],
            seq_len=ids.shape[1],
            reference_bits=reference_bits,
            seconds=round(seconds, 2),
            methods=methods,
            tokens=of_tokens,
        )
        module.record.note_layer_gains(summary)
        if module.trainer.is_global_zero:
            content = LayerGainsFile(
                windows=ids.shape[0],
                seq_len=ids.shape[1],
                reference_bits=reference_bits,
                unit=UNIT,
                rows=tuple(rows),
            )
            write_json(module.run_folder / LAYER_GAINS, content.to_json())
            say(f"Layer gains of {len(inputs)} inputs by {' and '.join(found)} in {seconds:.1f} s: {LAYER_GAINS}.")


@contextmanager
def _counted(module: ElasticCalibration) -> Iterator[None]:
    """Within it, the clock of the run counts passes through the model."""
    clock, done = module.clock, 0
    clock.restart()

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        clock.step(PHASE, done, max(done, clock.left.steps(PHASE)))

    handle = module.sliced.source.model.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()
        clock.end(PHASE)


def _summary(rows: Sequence[LayerGainRow], method: GainMethod) -> MethodGains:
    """The sum of all gains, and the inputs whose first slice after the base is worth most and least per bit and weight."""
    first = sorted((r for r in rows if r.slice == 2), key=lambda r: r.gains[method] / (r.bits * r.weights))
    total = torch.tensor([row.gains[method] for row in rows], dtype=torch.float64).sum()
    return MethodGains(float(total), first[-1].input, first[0].input) if first else MethodGains(0.0)
