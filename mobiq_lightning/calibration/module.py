"""The LightningModule: a frozen sliced LLaMA whose ranges and routers are calibrated block by block, then compared."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mobiq_lightning.calibration.block_check import check_blocks
from mobiq_lightning.calibration.block_share import BlockShare
from mobiq_lightning.calibration.checkpoint_parts import AT_REST, at_rest
from mobiq_lightning.calibration.comparison_of_run import comparison_of_run, drop_learned
from mobiq_lightning.calibration.fit_checks import check_plugins, check_processes, check_resumed, check_strategy
from mobiq_lightning.calibration.hidden_states import BlockInputs, HiddenStates, Storage
from mobiq_lightning.calibration.non_finite import describe_non_finite
from mobiq_lightning.calibration.planning import ModelSizes, RunClock, TimeLeft, sizes_of
from mobiq_lightning.calibration.rates import Rates, parameter_groups
from mobiq_lightning.calibration.record import CalibrationRecord
from mobiq_lightning.calibration.schedule import Schedule, Segment, Stage, default_stages
from mobiq_lightning.calibration.sliced_source import SlicedSource
from mobiq_lightning.calibration.stage_training import keep_bounds, keep_gradients, objective_on, unchanged_weights
from mobiq_lightning.calibration.streams import read_full, streams_of
from mobiq_lightning.calibration.text_of_run import read_text, text_of
from mobiq_lightning.errors import NonFiniteError
from mobiq_lightning.evaluation import Comparison
from mobiq_lightning.nn import BlockLayout, CalibratedBlock, RouterFactory, Share, SliceFactory
from mobiq_lightning.runs import HIDDEN_STATES, SharedWork
from mobiq_lightning.sources import ComparisonPass, TextWindows, load_source
from mobiq_lightning.strategies import LogitDistillation, NoTransform
from mobiq_lightning.strategies.base import BudgetSchedule, Objective
from mobiq_lightning.strategies.numbers import in_range
from mobiq_lightning.strategies.transform_base import Transform

DEFAULT_RATES = Rates()


class ElasticCalibration(LightningModule):
    """Calibrates slices and routers of a frozen causal language model, block after block, and end to end if it fits.

    The epochs of a fit are divided among blocks and stages; which is current follows from the trainer's epoch, which a
    checkpoint restores. Its parts: `sliced` (the source model with sliced linears), `schedule` (which epoch trains what) and
    `record` (what guards have seen and done).

    Args:
        pretrained: Source model: a Hugging Face hub id, a local folder, a GGUF file, or `builtin` (a small LLaMA that is
            trained once, offline, and cached).
        slices: How weights are cut into slices; built for every linear from (out_features, in_features).
        router: What scores tokens; built for every routed input from (in_features, n_slices).
        budget: Average bits asked for, over the progress through a block.
        objective: What a block is trained to match.
        epochs_per_block: Passes over the calibration windows for each decoder block, where stages are shares of them.
        stages: What is trained when, one `Stage` after the other. Default: the first third of a block's epochs trains ranges
            and transforms at fixed depths, the rest trains them and the routers together.
        rates: Learning rates, one for each kind of thing that is learned.
        share_routers: `input`: linears that read the same input share a router. `linear`: each has its own.
        dtype: The dtype of the source model: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        hidden_states: Where inputs and targets of the current block lie: `device`, `host` or `disk`.
        layout: Where the decoder blocks are, for models that are not laid out like LLaMA.
        threshold_scope: `layer`: every input meets the budget by itself. `global`: one threshold for all inputs.
        eval_bits: Budgets, in bits, at which the result is compared.
        random_seeds: Seeds of the allocations with random tokens in the comparison.
        transform: What is done to weights and inputs before weights are sliced; by default nothing.
        shared_work: Folder in which runs on the same model and text leave tokens and uncalibrated rows for each other.
        model_objective: What the whole model is trained to match in stages with `scope: model`.
        recompute_blocks: Whether those stages keep only the inputs of blocks and compute the rest again (gradient
            checkpointing).
        block_inputs: What blocks are trained on in block stages. `calibrated`: what the calibrated blocks before them give, so
            that they make up for the errors of those. `full`: what the full-precision model gives, so that no block depends on
            another, and several can be calibrated at once.
    """

    def __init__(
        self,
        pretrained: str,
        slices: SliceFactory,
        router: RouterFactory,
        budget: BudgetSchedule,
        objective: Objective,
        epochs_per_block: int = 6,
        stages: list[Stage] | None = None,
        rates: Rates = DEFAULT_RATES,
        share_routers: Share = "input",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        hidden_states: Storage = "host",
        layout: BlockLayout | None = None,
        threshold_scope: Literal["layer", "global"] = "layer",
        eval_bits: list[float] | None = None,
        random_seeds: list[int] | None = None,
        transform: Transform | None = None,
        shared_work: str | None = None,
        model_objective: Objective | None = None,
        recompute_blocks: bool = False,
        block_inputs: BlockInputs = "calibrated",
    ) -> None:
        super().__init__()
        self.pretrained, self.dtype_name = pretrained, dtype
        self.slices, self.router, self.transform = slices, router, transform or NoTransform()
        self.share_routers, self.layout = share_routers, layout or BlockLayout()
        self.budget, self.objective = budget, objective
        self.model_objective = model_objective or LogitDistillation()
        self.epochs_per_block, self.rates = epochs_per_block, rates
        self.stages = stages or default_stages()
        self.recompute_blocks, self.storage = recompute_blocks, hidden_states
        self.block_inputs: BlockInputs = block_inputs
        self.threshold_scope = threshold_scope
        self.eval_bits = eval_bits if eval_bits is not None else [2, 2.5, 3, 3.5, 4, 5, 6, 8]
        self.random_seeds = random_seeds if random_seeds is not None else [0, 1, 2]
        self.shared_work = SharedWork(shared_work)
        self.blocks = nn.ModuleList()
        self.record = CalibrationRecord()
        self.clock = RunClock(TimeLeft([]))
        self.share = BlockShare()
        self.hidden: HiddenStates | None = None
        self.comparison: Comparison | None = None
        self._sliced: SlicedSource | None = None
        for seed in self.random_seeds:
            in_range("model.random_seeds", seed, 0, 2**32 - 1)
        objectives = (objective, self.model_objective)
        check_plugins(slices, router, budget, objectives, epochs_per_block, self.stages, self.eval_bits, self.transform)
        self._random_state = torch.get_rng_state()

    # ------------------------------------------------------------------ set-up

    @property
    def sliced(self) -> SlicedSource:
        """The source model with sliced linears, loaded in `setup`."""
        assert self._sliced is not None, "setup loads the source model"
        return self._sliced

    @cached_property
    def sizes(self) -> ModelSizes:
        """Sizes of the source model, and of what is learned of it."""
        return sizes_of(self.sliced.source.model, self)

    @property
    def text(self) -> TextWindows:
        """The windows of text that the trainer was given.

        Raises:
            DataError: If the trainer has another data module, or none.
        """
        return text_of(self.trainer)

    @property
    def run_folder(self) -> Path:
        """Where this run writes."""
        return Path(self.trainer.default_root_dir)

    @property
    def hidden_states_folder(self) -> Path:
        """Where the tables lie if they are on disk; every rank, and every process with blocks of its own, has its own."""
        own = self.share.own
        name = f"rank-{self.global_rank}" if own is None else f"blocks-{own.start + 1}-{own.stop}"
        return self.run_folder / HIDDEN_STATES / name

    def setup(self, stage: str) -> None:
        """Loads the source model, reads the text with its tokenizer and, for a fit, slices the blocks."""
        check_strategy(self.trainer.strategy)
        text_of(self.trainer)
        if self.trainer.world_size > 1:  # DDP has seeded anew: routers are to begin as those of one process do
            torch.set_rng_state(self._random_state)
        if self._sliced is None:
            self._sliced = SlicedSource(
                load_source(self.pretrained, self.dtype_name),
                self.layout,
                self.blocks,
                slices=self.slices,
                router=self.router,
                transform=self.transform,
                share_routers=self.share_routers,
            )
        begins = stage == "fit" and len(self.blocks) == 0
        if begins:
            check_blocks(self.sliced.source.model, list(self.sliced.decoder), self.layout)
            self.share.check(len(self.sliced.decoder))
        read_text(self, stage)
        if begins:
            self.sliced.slice_blocks()
            self.schedule = Schedule(self.stages, self.epochs_per_block, len(self.blocks))
            # DDP's buckets cannot follow sizes that change in training; `on_after_backward` averages their gradients.
            self._ddp_params_and_buffers_to_ignore = [f"blocks.{name}" for name in self.sliced.resized_tensors()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the record of the calibration and how many processes share a step; says what does not change at present."""
        checkpoint["calibration"] = self.record.state_dict()
        checkpoint["processes"] = self.trainer.world_size
        checkpoint[AT_REST] = at_rest(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the record of the calibration from a training checkpoint.

        Raises:
            RunFolderError: If it is from before experts were sliced, or more or fewer processes shared a step then.
        """
        check_resumed(checkpoint["state_dict"], dict(self.named_modules()), self.run_folder)
        now = self.trainer.world_size
        check_processes(checkpoint.get("processes", now), now, self.text.batch_size, self.run_folder)
        self.record.load_state_dict(checkpoint["calibration"])

    # ------------------------------------------------------------------ inputs of blocks

    def make_caller(self) -> None:
        """Prepares calling single blocks; those that are tried again after NaN or infinity run in float32.

        With full-precision inputs they do so in their own steps alone, while blocks are calibrated: others do not depend on it.
        """
        alone = self.block_inputs == "full" and self.block_index is not None
        self.sliced.make_caller(self.device, () if alone else self.record.retried_blocks)

    def start_hidden_states(self) -> None:
        """Prepares the tables of block 0 for the current sweep from all calibration windows."""
        self.make_caller()
        stages = self.schedule.sweeps[self.segment.sweep]
        streams = streams_of(self.sliced, stages, self.objective.depths, self.budget.final_bits)
        # As many windows at a time as a step of all processes together takes: routed tables meet the budget for each.
        batch_size = self.text.batch_size * self.trainer.world_size
        self.hidden = HiddenStates(
            self.sliced.caller,
            self.text.calibration_ids(),
            streams,
            read_full(self.sliced),
            batch_size,
            self.storage,
            self.hidden_states_folder,
            lambda block: unchanged_weights(self, [self.sliced.block_at(block)]),
            self.block_inputs,
        )

    def end_hidden_states(self) -> None:
        """Drops the tables, and takes the frozen weights off the device."""
        self.hidden = None
        self.make_caller()

    # ------------------------------------------------------------------ training

    @property
    def segment(self) -> Segment:
        """What is trained in the current epoch."""
        return self.schedule.at(self.current_epoch)

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.segment.stage

    @property
    def block_index(self) -> int | None:
        """The block being calibrated; None if it is the whole model."""
        return self.segment.block

    @property
    def walks(self) -> bool:
        """Whether the current epoch is of a block that another process has calibrated: it passes without a step."""
        return self.share.walks(self.segment)

    def blocks_in_training(self) -> list[CalibratedBlock]:
        """The block being calibrated, or all."""
        block = self.block_index
        return [self.sliced.block_at(i) for i in (range(len(self.blocks)) if block is None else [block])]

    def progress(self, batch_idx: int) -> float:
        """Progress through the block, or its stage if that has epochs of its own, in [0, 1], before the step of `batch_idx`."""
        steps, span = int(self.trainer.num_training_batches), self.segment.span
        step = (self.current_epoch - span.start) * steps + batch_idx
        return step / max(1, len(span) * steps - 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step on a batch of calibration windows.

        Raises:
            NonFiniteError: If a term of the loss is NaN or infinite.
        """
        if self.walks:
            return torch.zeros((), device=self.device, requires_grad=True)
        block = self.block_index
        for calibrated in self.blocks_in_training():
            for router in calibrated.routers():
                router.reseed(self.global_step)
                router.temperature = 1.0 - 0.9 * self.progress(batch_idx)
        objective, run = objective_on(self, batch)
        target_bits = self.budget(self.progress(batch_idx))
        retried = block in self.record.rate_factors
        with ExitStack() as stack:
            if retried:
                stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if retried and block is not None:
                stack.enter_context(self.sliced.caller.in_float32({block}))
            terms = objective(run, target_bits, self.stage.trains("routers"))
        if not all(bool(torch.isfinite(value)) for value in terms.values()):
            raise NonFiniteError(describe_non_finite(self, batch_idx, terms, run), block)
        place = "model" if block is None else "block"
        logged: dict[str, Any] = {f"{place}/{name}": value.detach() for name, value in terms.items()}
        logged |= {f"{place}/stage": float(self.segment.number), f"{place}/target_bits": target_bits}
        if block is not None:
            logged["block/index"] = float(block)
        self.log_dict(logged, on_step=True, on_epoch=True, sync_dist=self.trainer.world_size > 1)
        return terms["loss"]

    def on_after_backward(self) -> None:
        """Keeps the gradients of what the current stage trains alone."""
        keep_gradients(self)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keeps what is trained within the bounds of the stage."""
        if not self.walks:
            keep_bounds(self)

    # ------------------------------------------------------------------ learning rates

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One AdamW over all blocks: only the current block is in the graph, and AdamW skips what has no gradient."""
        return torch.optim.AdamW(parameter_groups(self.sliced.calibrated_blocks(), self.rates), weight_decay=0.0)

    def on_train_epoch_start(self) -> None:
        """Sets the learning rates of shares: they run their course over the block's epochs, epoch by epoch."""
        if self.stage.share is not None:
            span = self.segment.span
            self._set_rates((self.current_epoch - span.start) / len(span), len(span))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets the learning rates of stages with epochs of their own, often few: they run their course step by step."""
        if self.stage.share is None:
            steps = len(self.segment.span) * int(self.trainer.num_training_batches)
            self._set_rates(self.progress(batch_idx), steps)

    def _set_rates(self, position: float, steps: int) -> None:
        """Learning rates at a position in [0, 1] of so many steps, times what a retry has lowered them by.

        A function of epoch and step alone, so that a resumed run takes the rates of the interrupted one.
        """
        factor = self.stage.lr_scale * self.record.rate_factor(self.block_index) * self.rates.share(position, steps)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["full_lr"] * factor

    # ------------------------------------------------------------------ comparison

    def on_validation_start(self) -> None:
        """Loads the saved checkpoint, in place of what was learned, and the source model as it was before any transform."""
        drop_learned(self)
        if self.sliced.source.config_changes is not None:
            self.sliced.replace_source(load_source(self.pretrained, self.dtype_name))
        self.comparison = comparison_of_run(self, self.run_folder, self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Runs one batch through every arm of this pass of the comparison."""
        assert self.comparison is not None
        self.comparison.step(batch, ComparisonPass(dataloader_idx), batch_idx)

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Between the passes, hands the bits that the router used to the controls."""
        assert self.comparison is not None
        number = ComparisonPass(dataloader_idx)
        if number is ComparisonPass.ROUTER and batch_idx == int(self.trainer.num_val_batches[number]) - 1:
            self.comparison.start_second_pass()
