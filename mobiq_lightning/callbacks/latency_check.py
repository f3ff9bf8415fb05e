"""Measures how fast the saved checkpoint is on the machine that compared it, at every budget of the comparison."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Trainer

from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.calibration.planning import FIXED, ModelSizes, Phase, StepTimes
from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.callbacks.place import place_of_results
from mobiq_lightning.checkpoint import add_results
from mobiq_lightning.console import say
from mobiq_lightning.errors import RecipeError
from mobiq_lightning.latency import Clock, print_budgets, time_linears
from mobiq_lightning.runs import ELASTIC, RESULTS, add_to_results, known_results
from mobiq_lightning.serving import measure_speed, store_speed
from mobiq_lightning.sources import TextWindows

LINEARS_SHARE = 0.4
"""Share of the time that linears are measured for; the rest is for decoding."""
NEW_TOKENS = {"cuda": 64, "cpu": 8}
"""Tokens that one measurement decodes, by the type of the device."""


class LatencyCheck(CalibrationCallback):
    """After the comparison, times the loaded checkpoint: its linears at each budget that was ever compared, and decoding.

    A model that is larger than the device, and is compared one block at a time, is not timed, which is said.

    Results go to results.json (``latency``) of run and checkpoint, to the terminal, to the loggers, and as a curve from bits
    to tokens per second to speed.json of the checkpoint, for `BitsPolicy`. Where the model runs on the reference, they say
    so.

    Args:
        seconds: About how long it may take; 0 switches it off. The lowest and the highest budget are decoded at in any
            case; when time is up, those between them are left out, and the policy interpolates.
    """

    order = 20  # adds to what `Results` has written, and logs after all others

    measures_speed: ClassVar[bool] = True
    """Whether it measures what other work on the machine disturbs; comparisons leave such callbacks out of their cells."""

    def __init__(self, seconds: float = 5.0) -> None:
        if seconds < 0:
            raise RecipeError(f"LatencyCheck: seconds ({seconds:g}) must be 0 or more")
        self.seconds = seconds

    def phases(self, module: ElasticCalibration, sizes: ModelSizes, text: TextWindows, times: StepTimes) -> list[Phase]:
        """What it takes by its own word."""
        return [Phase("latency check", FIXED, 1, self.seconds)] if self.seconds else []

    def on_validation_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Measures on the first rank."""
        if self.seconds == 0 or not trainer.is_global_zero:
            return
        comparison = module.comparison
        assert comparison is not None
        if comparison.passes is not None:
            say(f"Speed is not measured: the model is larger than {comparison.device}, and lies on the host.")
            return
        model, deadline = comparison.elastic, time.monotonic() + self.seconds
        run, place = module.run_folder, place_of_results(module)
        used = _used(place)
        clock = Clock(model.device, repeats=5, seconds=self.seconds * LINEARS_SHARE / 40)
        latency = time_linears(model, used, clock)
        speeds = _speeds(model, sorted(used), deadline)
        for row in latency["budgets"]:
            row["tokens_per_second"] = speeds.get(row["target_bits"], {}).get("tokens_per_second")
        results = add_to_results(place / RESULTS, latency=latency)
        # Else a checkpoint would be served by speeds at the thresholds or budgets of another comparison.
        if place == run:
            store_speed(run / ELASTIC, list(speeds.values()), latency["device"], latency["path"])
            add_results(run / ELASTIC, results)
        print_budgets(latency)
        _log(trainer, module, latency)


def _used(folder: Path) -> dict[float, float]:
    """The bits that the router used at each budget that the results in a folder hold."""
    measured = known_results(folder).measured
    rows = [row for row in measured.rows if row.allocation == "router"] if measured else []
    return {row.target_bits: row.used_bits for row in sorted(rows, key=lambda row: row.target_bits)}


def _speeds(model: Any, budgets: list[float], deadline: float) -> dict[float, dict[str, float]]:
    """What `measure_speed` gives by budget: the ends first, then what is farthest from those that are known."""
    found: dict[float, dict[str, float]] = {}
    pending = list(budgets)
    while pending:
        if not found:
            bits = pending[0]
        elif len(found) == 1:
            bits = pending[-1]
        else:
            if time.monotonic() > deadline:
                break
            bits = max(pending, key=lambda b: min(abs(b - known) for known in found))
        pending.remove(bits)
        new_tokens = NEW_TOKENS[model.device.type]
        found[bits] = measure_speed(model, [bits], new_tokens=new_tokens, repeats=2)[0]
    return dict(sorted(found.items()))


def _log(trainer: Trainer, module: ElasticCalibration, latency: dict[str, Any]) -> None:
    """One point per budget, after those of the comparison."""
    first = module.global_step + len(latency["budgets"]) + 1
    for logger in trainer.loggers:
        for number, row in enumerate(latency["budgets"]):
            figures = ("us", "gb_per_s", "of_copy", "times_plain", "tokens_per_second")
            metrics = {f"latency/{name}": row[name] for name in figures if row[name] is not None}
            logger.log_metrics({"eval/bits": row["used_bits"], **metrics}, step=first + number)
