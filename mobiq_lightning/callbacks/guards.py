"""Notices, when it happens, that a calibration does harm: a block, the model so far, or a router."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.pytorch import Trainer

from mobiq_lightning.calibration import ROUTED, ElasticCalibration, block_scores_of, eval_mode
from mobiq_lightning.calibration.guarding import (
    QUARTERS,
    Action,
    CollapsedRouter,
    DepthShare,
    ExplodingProbe,
    Guard,
    LinearWeight,
    Measured,
    OutlierWeight,
    Probe,
    ProbeReading,
    Sighting,
    State,
    WorseBlock,
    WorseDepth,
    act_on,
    depths_to_look_at,
    ends_quarter,
    state_of,
    worst_share,
)
from mobiq_lightning.calibration.planning import FORWARD, ModelSizes, Phase, StepTimes
from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.errors import RecipeError
from mobiq_lightning.nn import meet_budget
from mobiq_lightning.sources import TextWindows

PHASE = "guards"
WINDOWS, TOKENS = 4, 2048
"""Calibration windows to look at, and tokens of them together at most, where the recipe does not say."""


class Guards(CalibrationCallback):
    """At the end of every visit to a block, and of every stage of the whole model, compares with not having calibrated.

    Each guard has an action. ``stop`` ends the run with the numbers; ``repair`` mends and goes on; ``record`` leaves things as
    they are; all three are said on the terminal and listed in results.json (`guards`). ``off`` does not look.

    *Worse block.* The relative error of the block's output at each depth, on the inputs of that depth, against that of its
    round-to-nearest codes on the same inputs. A stage of the whole model is trained against logits, and may make single blocks
    worse while the model gets better: there the model's KL divergence is compared with that of the rounded model. Repair: the
    block falls back to round-to-nearest at all depths, which are one nested code, and is trained no more; the model goes back
    to where it was before the stage. One code with one range serves all depths, so a good calibration for few bits is always a
    little worse at 8 bits than rounding alone. Hence the limit: the rounded error at this depth and `worse_tolerance` of it,
    and `worse_tolerance` of the rounded error at the lowest depth besides.

    *Worse depth.* The KL divergence of the whole model at each depth, once no codes change any more, against that of the rounded
    model, and `worse_tolerance` of it: what the limit of a worse block lets pass at fine depths is said here. It has no repair.

    *Exploding probe.* The perplexity of calibration windows with the blocks that are done at each depth and the others in full
    precision, against the same with rounded blocks. Repair is that of a worse block. The way through all later blocks costs more
    than all else, so it is taken at every quarter of the blocks, and at any block behind which the calibrated model is farther
    from full precision than the rounded one.

    Where blocks are calibrated from full-precision inputs (``block_inputs: full``), a worse block and an exploding probe are
    looked for with all other blocks in full precision: what is decided does not depend on what those have learned. Worse depths
    are then looked for after stages of the whole model alone.

    *Collapsed router.* More than 99.5 % of the tokens of an input read one depth at a budget between two depths. Repair: static
    depths for that input at such budgets. Looked at when the router's stage is done, and again by `ThresholdTuning`.

    *Outlier weight.* A single weight that is more than 1000 times the typical magnitude of its row and its linear: the range of
    its group has no steps left for the others. It is noticed before its block is calibrated, and has no repair.

    All decisions are functions of the training state and the text, and are saved with training checkpoints.

    Args:
        worse_block: Action where a block, or the model after a stage of its own, is worse than rounded.
        worse_tolerance: The part of the rounded errors, at the depth and at the lowest depth, by which a depth may be worse; 0 or
            more. Of the rounded divergence at the depth alone, for a worse depth.
        worse_depth: Action where the model at a depth is farther from full precision than rounded; `repair` does what `record`
            does.
        exploding_probe: Action where the perplexity is not finite or above `probe_factor` times that of the rounded model.
        probe_factor: How many times the perplexity of the rounded model is too much, above 1.
        collapsed_router: Action where a router cannot tell tokens apart.
        windows: Calibration windows to look at, the first ones. By default 4, or fewer with 2048 tokens together.
        outlier_weight: Action where a single weight is far larger than the others; `repair` does what `record` does.
    """

    order = -20  # looks at a block before it is measured, exported and saved

    may_change_on_resume: ClassVar[bool] = True
    """Whether a run that goes on may have other arguments of this callback than it was started with."""

    def __init__(
        self,
        worse_block: Action = "repair",
        worse_tolerance: float = 0.05,
        exploding_probe: Action = "stop",
        probe_factor: float = 2.0,
        collapsed_router: Action = "repair",
        windows: int | None = None,
        outlier_weight: Action = "record",
        worse_depth: Action = "record",
    ) -> None:
        if not 0 <= worse_tolerance < math.inf:  # NaN is in no range
            raise RecipeError(f"Guards: worse_tolerance ({worse_tolerance:g}) must be at least 0")
        if not 1 < probe_factor < math.inf:
            raise RecipeError(f"Guards: probe_factor ({probe_factor:g}) must be above 1")
        if windows is not None and windows < 1:
            raise RecipeError(f"Guards: windows ({windows}) must be at least 1")
        self.worse_block = WorseBlock(worse_block, worse_tolerance)
        self.worse_depth = WorseDepth(worse_depth, worse_tolerance)
        self.exploding_probe = ExplodingProbe(exploding_probe, probe_factor)
        self.collapsed_router = CollapsedRouter(collapsed_router)
        self.outlier_weight = OutlierWeight(outlier_weight)
        self.windows = windows
        self._probe: tuple[int, Probe] | None = None
        self._before: State | None = None

    def phases(self, module: ElasticCalibration, sizes: ModelSizes, text: TextWindows, times: StepTimes) -> list[Phase]:
        """A look after every visit: the windows at each depth through a block, and at times through all that follow."""
        depths, blocks = len(sizes.slice_bits), sizes.n_blocks
        behind = sum(blocks - 1 - block for block in range(blocks) if ends_quarter(block, blocks))
        heads = min(blocks, QUARTERS) * sizes.vocabulary * sizes.width / sizes.sliced_of_block
        passes = blocks * (4 * depths + 1) + (behind + heads) * (2 * depths + 1)
        seconds = passes * self._windows(text) / text.batch_size * times.read
        return [Phase(PHASE, FORWARD, blocks, seconds / blocks)]

    def _windows(self, text: TextWindows) -> int:
        return max(1, min(WINDOWS, TOKENS // text.seq_len)) if self.windows is None else self.windows

    # ------------------------------------------------------------------ when

    def on_train_epoch_start(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Looks at weights that are about to be sliced, and keeps what a stage of the whole model begins with."""
        if module.walks:  # what was seen of it is taken over with the block
            return
        if module.current_epoch == module.segment.visit.start and module.segment.sweep == 0:
            self._look_at_weights(module)
        if module.block_index is not None:
            self._before = None
        elif module.current_epoch == module.segment.visit.start and self._may_repair():
            self._before = state_of(module)

    def on_train_epoch_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Looks at what was calibrated, before it is exported and saved."""
        if not module.schedule.ends_visit(module.current_epoch):
            return
        if not module.walks:
            self._look(trainer, module)
        done, visits = module.schedule.visits_until(module.current_epoch)
        module.clock.step(PHASE, done, visits)

    def _look(self, trainer: Trainer, module: ElasticCalibration) -> None:
        stages = module.schedule.stages_of_visit(module.current_epoch)
        if any(not stage.trains_routers_alone for stage in stages):
            self._look_at_codes(trainer, module)
        if any(stage.trains("routers") for stage in stages) and module.block_index is not None:
            self._look_at_routers(module, module.block_index)

    def on_fit_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Lets go of the windows."""
        self._probe = self._before = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot compute again: the beginning of the current stage of the whole model."""
        return {"before_stage": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._before = state_dict["before_stage"]

    # ------------------------------------------------------------------ weights

    def _look_at_weights(self, module: ElasticCalibration) -> None:
        if self.outlier_weight.action == "off":
            return
        block = module.block_index
        for index in range(len(module.blocks)) if block is None else [block]:
            calibrated = module.sliced.block_at(index)
            depth = calibrated.routed_inputs()[0].depths[-1]
            for key, linear in zip(calibrated.schemes, calibrated.sliced_linears(), strict=True):
                name = f"{module.layout.blocks}.{index}.{key.replace('-', '.')}"
                seen = self.outlier_weight.look(LinearWeight(name, linear.weight, depth))
                self._act(module, self.outlier_weight, seen)

    # ------------------------------------------------------------------ codes

    def _look_at_codes(self, trainer: Trainer, module: ElasticCalibration) -> None:
        if self.worse_block.action == self.worse_depth.action == self.exploding_probe.action == "off":
            return
        looked_at, compared = depths_to_look_at(module)
        found = trainer.strategy.broadcast(self._measure(module, looked_at))  # all ranks must decide alike
        worse = self.worse_block.look(ProbeReading(found, compared))
        if self._act(module, self.worse_block, worse) and self._may_repair():
            found = trainer.strategy.broadcast(self._measure(module, looked_at))
        if found.perplexity:
            self._log(module, found)
            self._act(module, self.exploding_probe, self.exploding_probe.look(ProbeReading(found, looked_at)))
            if self._all_done(module):
                self._act(module, self.worse_depth, self.worse_depth.look(ProbeReading(found, looked_at)))

    def _measure(self, module: ElasticCalibration, depths: Sequence[int]) -> Measured:
        sweep, block, text = module.segment.sweep, module.block_index, module.text
        if self._probe is None or self._probe[0] != sweep or block is None:
            windows = text.calibration_ids()[: self._windows(text)]
            alone = block is not None and module.block_inputs == "full"
            self._probe = sweep, Probe(module.sliced, windows, depths, text.batch_size, alone)
        probe = self._probe[1]
        if block is None:
            return probe.measure_model()
        probe.advance(block)
        last = block == len(module.blocks) - 1
        looks = self.exploding_probe.action != "off" or (last and self.worse_depth.action != "off")
        model = looks and (ends_quarter(block, len(module.blocks)) or None)
        return probe.measure_block(sweep > 0, model)

    def _all_done(self, module: ElasticCalibration) -> bool:
        """Whether the whole model was measured, its codes done: not one block with all others in full precision."""
        last = len(module.blocks) - 1
        whole = module.block_index is None or (module.block_index == last and module.block_inputs != "full")
        return whole and module.schedule.final_epoch(last) == module.current_epoch

    def _log(self, module: ElasticCalibration, found: Measured) -> None:
        metrics = {"probe/perplexity_full": found.full_perplexity}
        for (kind, depth), value in found.perplexity.items():
            metrics[f"probe/{'perplexity' if kind == 'calibrated' else 'rounded'}_{depth}_bits"] = value
        for logger in module.trainer.loggers:
            logger.log_metrics(metrics, step=module.global_step)

    # ------------------------------------------------------------------ routers

    def _look_at_routers(self, module: ElasticCalibration, block: int) -> None:
        inputs, routers = module.sliced.block_at(block).routed_inputs(), module.sliced.block_at(block).routers()
        if self.collapsed_router.action == "off" or not routers[0].per_token or module.hidden is None:
            return
        hidden = module.hidden.inputs[ROUTED][: self._windows(module.text)]
        with eval_mode(routers), meet_budget(inputs, module.budget.final_bits):
            scores = block_scores_of(module.sliced, block, hidden)
        first = next(i for i, routed in enumerate(module.sliced.all_inputs()) if routed is inputs[0])
        for name, routed, of_input in zip(module.sliced.input_names()[first:], inputs, scores, strict=False):
            share, bits = worst_share(routed, of_input)
            self.note_collapse(module, DepthShare(name, bits, share))

    def note_collapse(self, module: ElasticCalibration, seen: DepthShare) -> bool:
        """Looks at whether the router of an input can tell tokens apart, and acts if it cannot.

        Args:
            module: The calibration.
            seen: The largest share of the input's tokens that read one depth.

        Returns:
            Whether the input is to get static depths.

        Raises:
            GuardError: If it cannot, and the recipe says stop.
        """
        guard = self.collapsed_router
        sightings = [] if guard.action == "off" else guard.look(seen)
        if not sightings:
            return False
        if seen.input not in module.record.collapsed:
            self._act(module, guard, sightings)
        module.record.note_collapse(seen.input, seen.share)
        return guard.action == "repair"

    # ------------------------------------------------------------------ what is done

    def _act(self, module: ElasticCalibration, guard: Guard[Any], sightings: Sequence[Sighting]) -> bool:
        return act_on(module, guard, sightings, self._before)

    def _may_repair(self) -> bool:
        return "repair" in (self.worse_block.action, self.exploding_probe.action)


def guards_of(trainer: Trainer) -> Guards | None:
    """The guards of a run; None if its trainer has none, and nothing is looked at."""
    return next((c for c in trainer.callbacks if isinstance(c, Guards)), None)  # type: ignore[attr-defined]
