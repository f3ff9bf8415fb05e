"""Measures, once everything is calibrated, what each slice of each input gains the whole model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from lightning.pytorch import Trainer

from mobiq_lightning.calibration import (
    GAINS_PHASE,
    DoesNotFitError,
    ElasticCalibration,
    MeasuredGains,
    measuring_bytes,
    probe_gains,
    take_gradient_gains,
)
from mobiq_lightning.calibration.planning import (
    FORWARD,
    GainsPlan,
    ModelSizes,
    Phase,
    StepTimes,
    gradient_steps,
    head_steps,
    plan_gains,
    probe_passes,
)
from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.console import say
from mobiq_lightning.environment import free_on_device
from mobiq_lightning.errors import ModelError, RecipeError
from mobiq_lightning.evaluation import (
    rows_of,
    token_rows,
    token_summary,
)
from mobiq_lightning.files import write_json
from mobiq_lightning.runs import (
    LAYER_GAINS,
    LAYER_GAINS_SO_FAR,
    UNIT,
    GainMethod,
    GainsSummary,
    LayerGainRow,
    LayerGainsFile,
    MethodGains,
)
from mobiq_lightning.sources import TextWindows
from mobiq_lightning.strategies import ObservesGains


class LayerGains(CalibrationCallback):
    """Leaves layer_gains.json in the run folder, and shows routers that ask for it what their slices gain.

    The comparison takes its static layers of greatest gain from the file. They are measured when the checkpoint is written, or,
    for routers that ask for them, before `ThresholdTuning`, which asks the routers. What was measured is kept: a run that is
    killed goes on after it.

    Args:
        windows: Calibration windows to measure on, the first ones; 0 measures nothing.
        methods: `probes` or `gradients`, or both, beside what the router asks for. By default probes where they cost at most a
            tenth of the calibration, as products and sums are counted, else gradients, on fewer windows if these cost more.
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
        self.methods: list[GainMethod] | None = ["probes"] if methods is None and reference_bits else methods

    def phases(self, module: ElasticCalibration, sizes: ModelSizes, text: TextWindows, times: StepTimes) -> list[Phase]:
        """Passes of each batch through the whole model for probes; for gradients passes of all windows through a block."""
        asked = _asked(module.router(sizes.width, len(sizes.slice_bits)))
        plan, found = plan_gains(module, sizes, text, self.windows, self.methods, asked), []
        if "probes" in plan.methods:
            batches = -(-plan.windows // self.batch_size)
            found.append((batches * probe_passes(sizes), times.gains))
        if "gradients" in plan.methods:
            seconds = plan.windows / text.batch_size * times.read
            found.append((gradient_steps(sizes) + head_steps(sizes), seconds))
        steps = sum(count for count, _ in found)
        seconds = sum(count * each for count, each in found) / max(steps, 1)
        return [Phase(GAINS_PHASE, FORWARD, steps, seconds, late=asked is None)] if steps else []

    # ------------------------------------------------------------------ when

    def on_fit_start(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Refuses what would fail after hours of calibration.

        Raises:
            RecipeError: If an argument does not fit the slices, or the routers need gains and none are to be measured.
            ModelError: If the routers need probes of the whole model, which does not fit on the device.
        """
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
        needed = measuring_bytes(module, module.text.seq_len, self.batch_size, gradients=False)
        free = free_on_device(module.device)
        if _asked(routed.router) == "probes" and free is not None and needed > free:
            raise ModelError(
                f"{type(routed.router).__name__} needs probes of the whole model, which take about {needed / 1e9:.1f} GB on "
                f"{module.device}, of which {free / 1e9:.1f} GB are free; use another router, such as GradientLayerRouter, or a "
                "larger device"
            )

    def on_train_epoch_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Measures after the last epoch, before thresholds are tuned, if the routers ask for it."""
        asked = _asked(module.sliced.all_inputs()[0].router)
        if asked and module.current_epoch + 1 == trainer.max_epochs:
            self.measure(module, asked)

    def on_validation_start(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Measures when a calibration has written its checkpoint, before it is compared; `validate` measures nothing."""
        if len(module.blocks) and not module.record.layer_gains:
            self.measure(module, None)

    def on_validation_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Removes what was kept for a run that is killed."""
        if trainer.is_global_zero:
            shutil.rmtree(module.run_folder / LAYER_GAINS_SO_FAR, ignore_errors=True)

    # ------------------------------------------------------------------ what

    def measure(self, module: ElasticCalibration, asked: GainMethod | None) -> None:
        """Measures, tells the routers if they ask, and writes the file.

        Args:
            module: The calibration, all blocks being done.
            asked: The method that the routers ask for; None if they ask for none.

        Raises:
            ModelError: If the routers need what cannot be measured, since the whole model does not fit on the device.
        """
        plan = plan_gains(module, module.sizes, module.text, self.windows, self.methods, asked)
        if module.trainer.is_global_zero:
            (module.run_folder / LAYER_GAINS).unlink(missing_ok=True)
        if not plan.methods:
            module.record.note_layer_gains("not measured: switched off")
            return
        started = time.monotonic()
        try:
            with torch.inference_mode(False), torch.no_grad():  # Lightning compares in a mode that knows no gradients
                found = self._found(module, plan)
        except (DoesNotFitError, torch.OutOfMemoryError) as error:
            if isinstance(error, torch.OutOfMemoryError) and module.trainer.world_size > 1:
                raise  # the others go on measuring
            missing = f"not measured: {str(error).splitlines()[0]}"
            module.record.note_layer_gains(missing)
            if asked:
                name = type(module.sliced.all_inputs()[0].router).__name__
                raise ModelError(f"{name} needs layer gains, {missing}. Everything before is kept") from error
            say(f"Layer gains are {missing}; the comparison goes without best layers.")
            return
        finally:
            module.clock.end(GAINS_PHASE)
        if asked:
            for routed, gains in zip(module.sliced.all_inputs(), found.gains[asked], strict=True):
                assert isinstance(routed.router, ObservesGains)
                routed.router.observe_gains(gains, routed.slice_bits, routed.n_weights)
        self._write(module, found, time.monotonic() - started)

    def _found(self, module: ElasticCalibration, plan: GainsPlan) -> MeasuredGains:
        """Measures by each method; where probes do not fit and nobody asked for them, by gradients."""
        module.make_caller()
        windows = module.text.calibration_ids()[: plan.windows]
        found = MeasuredGains(plan, windows, self.reference_bits, self.batch_size)
        if "probes" in plan.methods:
            try:
                probe_gains(module, found)
            except DoesNotFitError as error:
                if self.methods is not None or _asked(module.sliced.all_inputs()[0].router):
                    raise
                found.plan = replace(plan, methods=("gradients",), why=f"for probes {error}")
        if "gradients" in found.plan.methods:
            take_gradient_gains(module, found)
        return found

    def _write(self, module: ElasticCalibration, found: MeasuredGains, seconds: float) -> None:
        inputs, names, (windows, seq_len) = (
            module.sliced.all_inputs(),
            module.sliced.input_names(),
            found.input_ids.shape,
        )
        rows = rows_of(found.gains, names, [routed.n_weights for routed in inputs], inputs[0].slice_bits)
        reference_bits = self.reference_bits if "probes" in found.gains else None
        methods, of_tokens = {method: _summary(rows, method) for method in found.gains}, None
        if found.tokens is not None and rows:
            spread = token_rows(found.tokens, found.views, seq_len)
            of_tokens = token_summary(found.tokens, spread, [row.bits * row.weights for row in rows])
            rows = [replace(row, tokens=one) for row, one in zip(rows, spread, strict=True)]
        summary = GainsSummary(
            windows=windows,
            seq_len=seq_len,
            reference_bits=reference_bits,
            seconds=round(seconds, 2),
            methods=methods,
            why=found.plan.why or None,
            tokens=of_tokens,
        )
        module.record.note_layer_gains(summary)
        if module.trainer.is_global_zero:
            content = LayerGainsFile(
                windows=windows, seq_len=seq_len, reference_bits=reference_bits, unit=UNIT, rows=tuple(rows)
            )
            write_json(module.run_folder / LAYER_GAINS, content.to_json())
            why = f" ({found.plan.why})" if found.plan.why else ""
            say(
                f"Layer gains of {len(inputs)} inputs by {' and '.join(methods)}{why} in {seconds:.1f} s: {LAYER_GAINS}."
            )
        module.trainer.strategy.barrier()  # the comparison of every rank reads the file


def _asked(router: object) -> GainMethod | None:
    """The method by which a router asks for gains; None if it does not."""
    return router.gains_from if isinstance(router, ObservesGains) else None


def _summary(rows: Sequence[LayerGainRow], method: GainMethod) -> MethodGains:
    """The sum of all gains, and the inputs whose first slice after the base is worth most and least per bit and weight."""
    first = sorted((r for r in rows if r.slice == 2), key=lambda r: r.gains[method] / (r.bits * r.weights))
    total = torch.tensor([row.gains[method] for row in rows], dtype=torch.float64).sum()
    return MethodGains(float(total), first[-1].input, first[0].input) if first else MethodGains(0.0)
