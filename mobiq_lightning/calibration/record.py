"""What has happened in a calibration, beside what its parameters have learned."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from mobiq_lightning.runs import GainsSummary, GuardEvent


@dataclass
class CalibrationRecord:
    """What guards have seen and done, what is known of layer gains, and which blocks were started anew.

    Training checkpoints carry it, so that a resumed run reports and decides what the interrupted one would have. Fields are
    read by whoever needs them and written by the methods alone.

    Args:
        guards: Events that guards have noticed, in the order of the run, as results.json lists them.
        collapsed: By the name of an input whose router cannot tell tokens apart, the largest share of its tokens, in [0, 1],
            that was seen to read one depth.
        layer_gains: Summary of the measured layer gains, or a sentence that says why there are none; empty before that.
        given_up: Indices of the blocks that fell back to codes without training: only their routers are trained any more.
        rate_factors: What the learning rates of a block (None: of the whole model) are multiplied with because it is tried
            again after NaN or infinity. The run folder keeps the tries, so training checkpoints do not.
    """

    guards: list[GuardEvent] = field(default_factory=list)
    collapsed: dict[str, float] = field(default_factory=dict)
    layer_gains: GainsSummary | str = ""
    given_up: set[int] = field(default_factory=set)
    rate_factors: dict[int | None, float] = field(default_factory=dict)

    def note_guard(self, event: GuardEvent) -> None:
        """Adds an event that a guard has noticed, with values as files have them: None if they are not finite."""
        self.guards.append(event)

    def note_collapse(self, name: str, share: float) -> None:
        """Notes that a share of the tokens of an input, in [0, 1], read one depth; the largest share is kept."""
        self.collapsed[name] = max(share, self.collapsed.get(name, 0.0))

    def keep_routers(self, static: Collection[str]) -> None:
        """Marks repairs of collapsed routers as merely recorded, but for those inputs that did get static depths.

        Args:
            static: Names of the inputs with static depths, at some budget at least.
        """
        for number, event in enumerate(self.guards):
            repaired = event.guard == "collapsed_router" and event.action == "repair"
            if repaired and event.input not in static:
                self.guards[number] = replace(event, action="record")

    def note_layer_gains(self, found: GainsSummary | str) -> None:
        """Keeps the summary of the measured layer gains, or the sentence that says why there are none."""
        self.layer_gains = found

    def give_up(self, block: int) -> None:
        """Notes that a block fell back to codes without training, for good."""
        self.given_up.add(block)

    def lower_rates(self, block: int | None, factor: float) -> None:
        """Multiplies the learning rates of a block (None: of the whole model) with a factor, as it is tried again."""
        self.rate_factors[block] = factor

    def rate_factor(self, block: int | None) -> float:
        """What the learning rates of a block, or of the whole model, are multiplied with; 1 where nothing failed."""
        return self.rate_factors.get(block, 1.0)

    @property
    def retried_blocks(self) -> set[int]:
        """Indices of the blocks that are tried again after NaN or infinity; they are tried in float32."""
        return {block for block in self.rate_factors if block is not None}

    def state_dict(self) -> dict[str, Any]:
        """What a training checkpoint keeps: plain values."""
        return {
            "guards": [event.to_json() for event in self.guards],
            "collapsed": self.collapsed,
            "layer_gains": self.layer_gains if isinstance(self.layer_gains, str) else self.layer_gains.to_json(),
            "given_up": sorted(self.given_up),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        where, gains = "the training checkpoint", state["layer_gains"]
        self.guards = [GuardEvent.from_json(event, where, "guards") for event in state["guards"]]
        self.layer_gains = gains if isinstance(gains, str) else GainsSummary.from_json(gains, where, "layer_gains")
        self.collapsed, self.given_up = dict(state["collapsed"]), set(state["given_up"])
