"""Notices, when it happens, that a calibration does harm: a block, the model so far, or a router."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from mobiq_lightning.calibration import ROUTED, ElasticCalibration, block_scores_of, eval_mode
from mobiq_lightning.calibration.guarding import (
    COLLAPSE_SHARE,
    Measured,
    Probe,
    State,
    restore,
    round_block,
    state_of,
    worst_share,
)
from mobiq_lightning.callbacks.layerwise_calibration import checked
from mobiq_lightning.console import say
from mobiq_lightning.errors import GuardError, RecipeError
from mobiq_lightning.nn import meet_budget
from mobiq_lightning.runs import GuardEvent, GuardName, sentence

Action = Literal["stop", "repair", "record", "off"]

_ADVICE = {
    "worse_block": "Lower model.weights_lr or model.slices_lr, or give the stages more epochs",
    "exploding_probe": "Lower model.weights_lr or model.slices_lr, or give the stages more epochs",
    "collapsed_router": "Lower model.router_lr, give its stage more epochs, or take another model.router",
}


class Excess(NamedTuple):
    """A figure beyond its limit.

    Args:
        depth: Depth or budget at which it was measured, in bits.
        value: The figure, finite or not.
        limit: What it should not have exceeded.
    """

    depth: float
    value: float
    limit: float


class Guards(Callback):
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

    *Exploding probe.* The perplexity of calibration windows with the blocks that are done at each depth and the others in full
    precision, against the same with rounded blocks. Repair is that of a worse block.

    *Collapsed router.* More than 99.5 % of the tokens of an input read one depth at a budget between two depths. Repair: static
    depths for that input at such budgets. Looked at when the router's stage is done, and again by `ThresholdTuning`.

    All decisions are functions of the training state and the text, and are saved with training checkpoints.

    Args:
        worse_block: Action where a block, or the model after a stage of its own, is worse than rounded.
        worse_tolerance: See above.
        exploding_probe: Action where the perplexity is not finite or above `probe_factor` times that of the rounded model.
        probe_factor: Above 1.
        collapsed_router: Action where a router cannot tell tokens apart.
        windows: Calibration windows to look at, the first ones.
    """

    may_change_on_resume: ClassVar[bool] = True
    """Whether a run that goes on may have other arguments of this callback than it was started with."""

    def __init__(
        self,
        worse_block: Action = "repair",
        worse_tolerance: float = 0.05,
        exploding_probe: Action = "stop",
        probe_factor: float = 2.0,
        collapsed_router: Action = "repair",
        windows: int = 4,
    ) -> None:
        if worse_tolerance < 0:
            raise RecipeError(f"Guards: worse_tolerance ({worse_tolerance:g}) must be at least 0")
        if probe_factor <= 1:
            raise RecipeError(f"Guards: probe_factor ({probe_factor:g}) must be above 1")
        if windows < 1:
            raise RecipeError(f"Guards: windows ({windows}) must be at least 1")
        self.actions: dict[GuardName, Action] = {
            "worse_block": worse_block,
            "exploding_probe": exploding_probe,
            "collapsed_router": collapsed_router,
        }
        self.tolerance, self.factor, self.windows = worse_tolerance, probe_factor, windows
        self._probe: tuple[int, Probe] | None = None
        self._before: State | None = None

    # ------------------------------------------------------------------ when

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps what a stage of the whole model begins with, where it may have to go back there."""
        module = checked(pl_module)
        if module.block_index is not None:
            self._before = None
        elif module.current_epoch == module.segment.visit.start and self._may_repair():
            self._before = state_of(module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at what was calibrated, before it is exported and saved."""
        module = checked(pl_module)
        if not module.schedule.ends_visit(module.current_epoch):
            return
        stages = module.schedule.stages_of_visit(module.current_epoch)
        if any(stage.train != ["routers"] for stage in stages):
            self._look_at_codes(trainer, module)
        if any(stage.trains("routers") for stage in stages) and module.block_index is not None:
            self._look_at_routers(module, module.block_index)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets go of the windows."""
        self._probe = self._before = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot compute again: the beginning of the current stage of the whole model."""
        return {"before_stage": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it up again."""
        self._before = state_dict["before_stage"]

    # ------------------------------------------------------------------ codes

    def _look_at_codes(self, trainer: Trainer, module: ElasticCalibration) -> None:
        if self.actions["worse_block"] == self.actions["exploding_probe"] == "off":
            return
        looked_at, compared = depths_to_look_at(module)
        found = trainer.strategy.broadcast(self._measure(trainer, module, looked_at))  # all ranks must decide alike
        worse = list(self._worse(found, compared, module.block_index is None))
        if self._act(module, "worse_block", worse) and self._may_repair():
            found = trainer.strategy.broadcast(self._measure(trainer, module, looked_at))
        self._log(module, found)
        self._act(module, "exploding_probe", list(self._exploded(found, looked_at)))

    def _measure(self, trainer: Trainer, module: ElasticCalibration, depths: Sequence[int]) -> Measured:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        sweep, block = module.segment.sweep, module.block_index
        if self._probe is None or self._probe[0] != sweep or block is None:
            self._probe = sweep, Probe(module, data.calibration_ids()[: self.windows], depths, data.batch_size)
        probe = self._probe[1]
        if block is None:
            return probe.measure_model()
        probe.advance(block)
        return probe.measure_block(others_sliced=sweep > 0)

    def _worse(self, found: Measured, depths: Sequence[int], whole_model: bool) -> list[Excess]:
        values = found.kl if whole_model else found.error
        lowest = values["rounded", min(depth for _, depth in values)]
        events = []
        for depth in depths:
            value, rounded = values["calibrated", depth], values["rounded", depth]
            limit = rounded + self.tolerance * (rounded + lowest)
            if math.isfinite(limit) and not value <= limit:
                events.append(Excess(depth, value, limit))
        return events

    def _exploded(self, found: Measured, depths: Sequence[int]) -> list[Excess]:
        events = []
        for depth in depths:
            value, limit = found.perplexity["calibrated", depth], self.factor * found.perplexity["rounded", depth]
            if not (math.isfinite(value) and value <= limit):
                events.append(Excess(depth, value, limit))
        return events

    def _log(self, module: ElasticCalibration, found: Measured) -> None:
        metrics = {"probe/perplexity_full": found.full_perplexity}
        for (kind, depth), value in found.perplexity.items():
            metrics[f"probe/{'perplexity' if kind == 'calibrated' else 'rounded'}_{depth}_bits"] = value
        for logger in module.trainer.loggers:
            logger.log_metrics(metrics, step=module.global_step)

    # ------------------------------------------------------------------ routers

    def _look_at_routers(self, module: ElasticCalibration, block: int) -> None:
        inputs, routers = module.block_at(block).routed_inputs(), module.block_at(block).routers()
        if self.actions["collapsed_router"] == "off" or not routers[0].per_token or module.hidden is None:
            return
        hidden = module.hidden.inputs[ROUTED][: self.windows]
        with eval_mode(routers), meet_budget(inputs, module.budget.final_bits):
            scores = block_scores_of(module, block, hidden)
        first = next(i for i, routed in enumerate(module.all_inputs()) if routed is inputs[0])
        for number, of_input in enumerate(scores, start=first):
            share, bits = worst_share(module, number, of_input)
            if share > COLLAPSE_SHARE:
                self.note_collapse(module, number, share, bits)

    def note_collapse(self, module: ElasticCalibration, number: int, share: float, bits: float) -> bool:
        """Acts on a router that cannot tell tokens apart.

        Args:
            module: The calibration.
            number: Of the input, as of `all_inputs`.
            share: Of its tokens that read the same depth.
            bits: The budget at which they do.

        Returns:
            Whether its input is to get static depths.

        Raises:
            GuardError: If the recipe says so.
        """
        name, action = module.input_names()[number], self.actions["collapsed_router"]
        if action == "off":
            return False
        if name not in module.collapsed:
            self._act(module, "collapsed_router", [Excess(bits, share, COLLAPSE_SHARE)], name)
        module.collapsed[name] = max(share, module.collapsed.get(name, 0.0))
        return action == "repair"

    # ------------------------------------------------------------------ what is done

    def _act(
        self, module: ElasticCalibration, guard: GuardName, seen: Sequence[Excess], input_name: str | None = None
    ) -> bool:
        """Notes what was seen, says it, and does what the recipe asks for.

        Args:
            module: The calibration.
            guard: The guard that has seen it.
            seen: What it has seen.
            input_name: Name of the input whose router it is about, if it is about one.

        Returns:
            Whether anything was seen.

        Raises:
            GuardError: If the recipe says stop.
        """
        action = self.actions[guard]
        if not seen or action == "off":
            return False
        block = module.block_index
        if action == "repair" and guard != "collapsed_router" and not self._can_repair(block, module):
            action = "record"
        noted = [GuardEvent(guard, block, input_name, action, module.current_epoch, *excess) for excess in seen]
        if action == "stop":
            said = "\n".join(sentence(event, module.schedule.n_epochs) for event in noted)
            raise GuardError(
                f"{said}\n{_ADVICE[guard]}, and start again with --overwrite. Or set `{guard}` of the callback Guards in "
                "trainer.callbacks to repair or record: then the same command goes on here; finished blocks are kept"
            )
        for event in noted:
            say(sentence(event, module.schedule.n_epochs))
            module.guards.append(replace(event, value=_finite(event.value), limit=_finite(event.limit)))
        if action == "repair" and guard != "collapsed_router":
            if block is None:
                assert self._before is not None
                restore(module, self._before)
            else:
                round_block(module, block)
        return True

    def _can_repair(self, block: int | None, module: ElasticCalibration) -> bool:
        return self._before is not None if block is None else block not in module.rounded

    def _may_repair(self) -> bool:
        return "repair" in (self.actions["worse_block"], self.actions["exploding_probe"])


def depths_to_look_at(module: ElasticCalibration) -> tuple[list[int], list[int]]:
    """Depths, in bits, that are calibrated at the end of the current visit, and those of them to compare with rounding.

    When nothing moves the codes any more, these are all depths. Before that, those that were trained; and of a block that was
    trained as a part of the whole model before, only those that this visit has trained, since the others owe the block nothing.
    """
    schedule, segment, all_depths = module.schedule, module.segment, module.block_at(0).routed_inputs()[0].depths
    objective = module.objective.depths if segment.block is not None else module.model_objective.depths

    def trained(segments: Sequence[Any]) -> set[int]:
        return {
            depth
            for s in segments
            if s.stage.train != ["routers"]
            for depth in ((s.stage.depth,) if s.stage.depth else objective)
        }

    so_far = [
        s for s in schedule.segments if s.epochs.start <= module.current_epoch and s.block in (segment.block, None)
    ]
    looked_at = trained(so_far)
    block = 0 if segment.block is None else segment.block
    if schedule.final_epoch(block) == module.current_epoch:
        looked_at = set(all_depths)
    mixed = segment.block is not None and any(s.block is None and s.stage.train != ["routers"] for s in so_far)
    compared = trained([s for s in so_far if s.visit == segment.visit]) if mixed else looked_at
    return sorted(looked_at), sorted(compared)


def guards_of(trainer: Trainer) -> Guards:
    """The guards of a run, or those of every run."""
    return next((c for c in trainer.callbacks if isinstance(c, Guards)), Guards())  # type: ignore[attr-defined]


def _finite(value: float | None) -> float | None:
    """A value as JSON has it: None if it is not finite."""
    return None if value is None or not math.isfinite(value) else value
