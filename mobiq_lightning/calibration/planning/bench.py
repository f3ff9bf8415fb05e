"""A random model of the shapes of another, with one or two decoder blocks, on which steps of a run are measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from mobiq_lightning.calibration.block_batch import BlockBatch
from mobiq_lightning.calibration.hidden_states import HiddenStates
from mobiq_lightning.calibration.model_batch import ModelBatch
from mobiq_lightning.calibration.planning.memory import rows_at_once
from mobiq_lightning.calibration.planning.random_model import random_model
from mobiq_lightning.calibration.planning.sizes import ModelSizes
from mobiq_lightning.calibration.rates import KINDS, parameter_groups
from mobiq_lightning.calibration.schedule import Stage
from mobiq_lightning.calibration.sliced_source import SlicedSource
from mobiq_lightning.calibration.streams import read_full, streams_of
from mobiq_lightning.nn import KEPT_BYTES, fixed_depth, full_precision, keeping_weights
from mobiq_lightning.sources import Source
from mobiq_lightning.strategies import TrainableCodes
from mobiq_lightning.strategies.objectives.logit_distillation import divergences_of_tokens

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration
    from mobiq_lightning.sources import TextWindows

_WORTH_REPEATING = 0.5
"""Seconds below which a step is taken again: the first one waits for memory and for code."""
_MOST_OPERATIONS = 2e11
"""Operations of a training pass of one block on a CPU beyond which windows are cut for measuring, and the time is scaled."""
_SHORTEST = 32
"""Tokens to which windows are cut at most."""
_WRITTEN = 8
"""Tokens of a document that are written to see what one takes."""


@dataclass
class StepTimes:
    """Seconds on this machine.

    Args:
        stages: One step of each stage, by its number.
        read: A batch of calibration windows through one block, without gradients.
        gains: A batch of windows through the model at one depth, compared with full precision, for layer gains.
        compared: A batch of evaluation windows through the model, with what is measured of it.
        written: One token of all documents that are written at a time.
    """

    stages: dict[int, float] = field(default_factory=dict)
    read: float = 0.0
    gains: float = 0.0
    compared: float = 0.0
    written: float = 0.0


class Bench:
    """A random model with so many blocks, and one step of each kind on it."""

    def __init__(
        self,
        config: Any,
        n_blocks: int,
        sizes: ModelSizes,
        module: ElasticCalibration,
        text: TextWindows,
        device: torch.device,
    ) -> None:
        self.sizes, self.module, self.text, self.device = sizes, module, text, device
        model = random_model(config, range(n_blocks), device)
        self.blocks = nn.ModuleList()
        source = Source(module.pretrained, model, None, "", Path())
        self.sliced = SlicedSource(
            source,
            module.layout,
            self.blocks,
            slices=module.slices,
            router=module.router,
            transform=module.transform,
            share_routers=module.share_routers,
        )
        self.written = self._written(model) if text.n_generated else 0.0
        self.sliced.slice_blocks()
        self.blocks.to(device)
        self.sliced.make_caller(device, ())
        self.optimizer = torch.optim.AdamW(parameter_groups(self.sliced.calibrated_blocks(), module.rates))

    def times(self, blocks: bool) -> StepTimes:
        """All of them, stages in their order, since codes follow each other.

        Args:
            blocks: Measure stages of single blocks too.
        """
        found = StepTimes(written=self.written)
        length = self._length(self.text.batch_size, self.text.seq_len)
        wide_length = self._length(self.text.eval_batch_size, self.text.eval_seq_len)
        ids = self._ids(self.text.batch_size, length)
        for block in self.sliced.calibrated_blocks():
            block.show_weights_to_routers()
        known: dict[str, float] = {}
        for number, stage in enumerate(self.module.stages):
            if stage.scope == "block" and not blocks:
                continue
            key = f"{stage.scope} {stage.train} {stage.depth} {stage.other_depths}"
            if key not in known:
                known[key] = self.stage_seconds(stage, ids)
            found.stages[number] = known[key]
        depth = self.sizes.slice_bits[0]
        inputs = self.sliced.all_inputs()
        with torch.no_grad():
            hidden = self.sliced.caller.embed(ids)
            with fixed_depth(inputs, depth):
                with self._kept():
                    found.read = self.seconds(lambda: self.sliced.caller.call(0, hidden))
                self.sliced.caller.release()
                self.sliced.source.model.to(self.device)
                found.gains = self.seconds(lambda: self._compare(self._ids(4, length)))
            with full_precision(inputs):
                wide = self._ids(self.text.eval_batch_size, wide_length)
                found.compared = self.seconds(lambda: self._compare(wide))
        longer = self.text.seq_len / length
        found.stages = {number: longer * seconds for number, seconds in found.stages.items()}
        found.read, found.gains = longer * found.read, longer * found.gains
        found.compared *= self.text.eval_seq_len / wide_length
        return found

    def _length(self, rows: int, length: int) -> int:
        """Tokens to which windows are cut for measuring."""
        operations = 6 * self.sizes.sliced_of_block * rows * length
        if self.device.type != "cpu" or operations <= _MOST_OPERATIONS:
            return length
        return min(length, max(_SHORTEST, int(length * _MOST_OPERATIONS / operations)))

    def _kept(self) -> AbstractContextManager[None]:
        """Within it, the first block keeps the weights that it makes, as where nothing changes them."""
        return keeping_weights(self.sliced.block_at(0).sliced_linears(), KEPT_BYTES)

    def stage_seconds(self, stage: Stage, ids: torch.Tensor) -> float:
        """Seconds of a step of a stage on windows (B, T); what it trains is trained from now on."""
        module, sliced = self.module, self.sliced
        routed = stage.trains("routers")
        if stage.trains("codes") and stage.depth is not None:
            for block in sliced.calibrated_blocks() if stage.scope == "model" else [sliced.block_at(0)]:
                for linear in block.sliced_linears():
                    if isinstance(linear.scheme, TrainableCodes):
                        linear.scheme.start_slice(linear.sliced_weight().to(self.device), stage.depth)
        for block in sliced.calibrated_blocks():
            for kind in KINDS:
                for parameter in block.parameters_of(kind):
                    parameter.requires_grad_(stage.trains(kind))
        bits = module.budget.final_bits
        if stage.scope == "model":
            model = sliced.source.model.to(self.device)

            def terms() -> Any:
                whole = ModelBatch(
                    model, list(sliced.decoder), sliced.all_inputs(), ids, stage.depths, module.recompute_blocks
                )
                return module.model_objective(whole, bits, routed)
        else:
            streams = streams_of(sliced, [stage], module.objective.depths, bits)
            hidden = HiddenStates(sliced.caller, ids, streams, read_full(sliced), self.text.batch_size)
            index = torch.arange(len(ids))

            def terms() -> Any:
                block = BlockBatch(sliced.block_at(0), 0, sliced.caller, hidden, index, stage.depths)
                return module.objective(block, bits, routed)

        def step() -> None:
            loss = terms()["loss"]
            if loss.requires_grad:
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        with self._kept() if stage.trains_routers_alone and stage.scope == "block" else nullcontext():
            return self.seconds(step)

    def _compare(self, ids: torch.Tensor) -> None:
        logits = self.sliced.source.model(input_ids=ids, use_cache=False).logits
        divergences_of_tokens(logits, F.log_softmax(logits.float(), dim=-1))

    def _written(self, model: Any) -> float:
        begin = self._ids(rows_at_once(self.sizes, self.text), 1)

        def write() -> None:
            model.generate(
                begin,
                attention_mask=torch.ones_like(begin),
                do_sample=True,
                max_new_tokens=_WRITTEN,
                min_new_tokens=_WRITTEN,
                pad_token_id=0,
                eos_token_id=None,
            )

        return self.seconds(write) / _WRITTEN

    def _ids(self, rows: int, length: int) -> torch.Tensor:
        return torch.randint(self.sizes.vocabulary, (rows, length), device=self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """What something takes; of two times the second one, if the first is short."""
        for _ in range(2):
            started = time.perf_counter()
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - started
            if seconds > _WORTH_REPEATING:
                break
        return seconds
