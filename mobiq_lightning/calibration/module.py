"""The LightningModule: a frozen sliced LLaMA whose ranges and routers are calibrated block by block, then compared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from mobiq_lightning.calibration.block_batch import ROUTED, BlockBatch
from mobiq_lightning.calibration.fit_checks import check_plugins
from mobiq_lightning.calibration.hidden_states import HiddenStates, Reading, Storage, eval_mode
from mobiq_lightning.calibration.model_batch import ModelBatch
from mobiq_lightning.calibration.schedule import Schedule, Segment, Stage
from mobiq_lightning.calibration.sliced_model import SlicedModel
from mobiq_lightning.errors import NonFiniteError
from mobiq_lightning.nn import (
    BlockLayout,
    CalibratedBlock,
    Learned,
    RouterFactory,
    Share,
    SliceFactory,
    fixed_depth,
    full_precision,
    meet_budget,
)
from mobiq_lightning.strategies import LogitDistillation, NoTransform, TrainableCodes
from mobiq_lightning.strategies.base import BlockRun, BudgetSchedule, Objective
from mobiq_lightning.strategies.transform_base import Transform


class ElasticCalibration(SlicedModel):
    """Calibrates slices and routers of a frozen causal language model, block after block, and end to end if it fits.

    The epochs of a fit are divided among blocks and stages; which is current follows from the trainer's epoch, which a
    checkpoint restores.

    Args:
        pretrained: Source model: a Hugging Face hub id, a local folder, or `builtin` (a small LLaMA that is trained once,
            offline, and cached).
        slices: How weights are cut into slices; built for every linear from (out_features, in_features).
        router: What scores tokens; built for every routed input from (in_features, n_slices).
        budget: Average bits asked for, over the progress through a block.
        objective: What a block is trained to match.
        epochs_per_block: Passes over the calibration windows for each decoder block, where stages are shares of them.
        stages: What is trained when, see `Stage`. Default: the first third of a block's epochs trains the slices at fixed
            depths, the rest slices and routers together.
        slices_lr: Learning rate of what the slice scheme learns of ranges.
        router_lr: Learning rate of the routers.
        share_routers: `input`: linears that read the same input share a router. `linear`: each has its own.
        dtype: Of the source model: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        hidden_states: Where inputs and targets of the current block lie: `device`, `host` or `disk`.
        layout: Where the decoder blocks are, for models that are not laid out like LLaMA.
        threshold_scope: `layer`: every input meets the budget by itself. `global`: one threshold for all inputs.
        eval_bits: Budgets, in bits, at which the result is compared.
        random_seeds: Seeds of the allocations with random tokens in the comparison.
        transform: What is done to weights and inputs before weights are sliced; by default nothing.
        transform_lr: Learning rate of what the transform learns.
        shared_work: Folder in which runs on the same model and text leave tokens and uncalibrated rows for each other.
        weights_lr: Learning rate of codes, in the unit of the weights, in stages that train `weights` or `rounding`.
        model_objective: What the whole model is trained to match in stages with `scope: model`.
        recompute_blocks: Whether those stages keep only the inputs of blocks and compute the rest again (gradient
            checkpointing).
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
        slices_lr: float = 5e-3,
        router_lr: float = 1e-3,
        share_routers: Share = "input",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        hidden_states: Storage = "host",
        layout: BlockLayout | None = None,
        threshold_scope: Literal["layer", "global"] = "layer",
        eval_bits: list[float] | None = None,
        random_seeds: list[int] | None = None,
        transform: Transform | None = None,
        transform_lr: float = 5e-3,
        shared_work: str | None = None,
        weights_lr: float = 1e-3,
        model_objective: Objective | None = None,
        recompute_blocks: bool = False,
    ) -> None:
        transform = transform or NoTransform()
        super().__init__(
            pretrained,
            dtype,
            slices,
            router,
            transform,
            share_routers,
            layout,
            threshold_scope,
            eval_bits,
            random_seeds,
            shared_work,
        )
        self.budget, self.objective = budget, objective
        self.epochs_per_block = epochs_per_block
        self.stages = stages or [Stage(1 / 3, ["slices"]), Stage(2 / 3, ["slices", "routers"])]
        self.model_objective = model_objective or LogitDistillation()
        self.recompute_blocks, self.storage = recompute_blocks, hidden_states
        self.rates: dict[Learned, float] = {"slices": slices_lr, "weights": weights_lr}
        self.rates |= {"transforms": transform_lr, "routers": router_lr}
        self.hidden: HiddenStates | None = None
        objectives = (objective, self.model_objective)
        check_plugins(slices, router, budget, objectives, epochs_per_block, self.stages, self.eval_bits, transform)

    # ------------------------------------------------------------------ inputs of blocks

    def build_blocks(self) -> None:
        """Replaces the linears of the decoder blocks by sliced ones, and lays out the epochs."""
        super().build_blocks()
        self.schedule = Schedule(self.stages, self.epochs_per_block, len(self.blocks))

    def start_hidden_states(self, input_ids: Tensor) -> None:
        """Prepares the tables of block 0 for the current sweep from calibration windows (N, T)."""
        self.make_caller()
        stages = self.schedule.sweeps[self.segment.sweep]
        depths = {d for s in stages for d in (self.objective.depths if s.depths is None else s.depths)}
        streams: dict[str, Reading] = {}
        if any(stage.trains("routers") for stage in stages):
            streams[ROUTED] = self._read_routed
        streams |= {str(depth): self._read_at(depth) for depth in sorted(depths)}
        batch_size = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        self.hidden = HiddenStates(
            self.caller, input_ids, streams, self._read_full, batch_size, self.storage, self.hidden_states_folder
        )

    # ------------------------------------------------------------------ how a stream reads a block

    def _read_full(self, block: int, batch: int) -> AbstractContextManager[Any]:
        return full_precision(self.block_at(block).routed_inputs())

    def _read_at(self, depth: int) -> Any:
        def read(block: int, batch: int) -> AbstractContextManager[Any]:
            return fixed_depth(self.block_at(block).routed_inputs(), depth)

        return read

    @contextmanager
    def _read_routed(self, block: int, batch: int) -> Iterator[None]:
        calibrated = self.block_at(block)
        for router in calibrated.routers():
            router.reseed(-1 - batch)
        with eval_mode(calibrated.routers()), meet_budget(calibrated.routed_inputs(), self.budget.final_bits):
            yield

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

    def blocks_in_training(self) -> list[CalibratedBlock]:
        """The block being calibrated, or all."""
        block = self.block_index
        return [self.block_at(i) for i in (range(len(self.blocks)) if block is None else [block])]

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
        block = self.block_index
        for calibrated in self.blocks_in_training():
            for router in calibrated.routers():
                router.reseed(self.global_step)
                router.temperature = 1.0 - 0.9 * self.progress(batch_idx)
        objective, run = self._objective_on(batch)
        target_bits = self.budget(self.progress(batch_idx))
        retried = block in self.lr_scales
        with torch.autocast(self.device.type, enabled=False) if retried else nullcontext():
            terms = objective(run, target_bits, self.stage.trains("routers"))
        if not all(bool(torch.isfinite(value)) for value in terms.values()):
            raise NonFiniteError(self._describe_non_finite(block, batch_idx, terms, run), block)
        place, index = ("model", 0.0) if block is None else ("block", float(block))
        logged: dict[str, Any] = {f"{place}/{name}": value.detach() for name, value in terms.items()}
        logged |= {f"{place}/stage": float(self.segment.number), f"{place}/target_bits": target_bits}
        logged |= {} if block is None else {"block/index": index}
        self.log_dict(logged, on_step=True, on_epoch=True, sync_dist=self.trainer.world_size > 1)
        return terms["loss"]

    def _objective_on(self, batch: dict[str, Tensor]) -> tuple[Objective, BlockRun]:
        """What the current stage trains to match, and what it sees of the batch."""
        block, depths = self.block_index, self.stage.depths
        if block is None:
            decoder = list(self.layout.find(self.source.model))
            ids = batch["input_ids"].to(self.device)
            run = ModelBatch(self.source.model, decoder, self.all_inputs(), ids, depths, self.recompute_blocks)
            return self.model_objective, run
        assert self.hidden is not None
        return self.objective, BlockBatch(self.block_at(block), block, self.caller, self.hidden, batch["index"], depths)

    def _describe_non_finite(self, block: int | None, batch_idx: int, terms: dict[str, Tensor], run: BlockRun) -> str:
        bad = ", ".join(f"{name} = {value.item()}" for name, value in terms.items() if not torch.isfinite(value))
        named = [item for calibrated in self.blocks_in_training() for item in calibrated.named_parameters()]
        broken = [name for name, p in named if not bool(torch.isfinite(p).all())]
        inputs = (
            [run.inputs(name) for name in self.hidden.inputs] if isinstance(run, BlockBatch) and self.hidden else []
        )
        largest = "".join(
            f" Largest input of the block: {max(float(x.abs().max()) for x in inputs):.4g}." for _ in inputs[:1]
        )
        rates = ", ".join(f"{g['name']} {g['lr']:.2g}" for g in self.trainer.optimizers[0].param_groups)
        place = "the whole model" if block is None else f"block {block + 1}/{len(self.blocks)}"
        return (
            f"{place}, epoch {self.current_epoch - self.segment.visit.start + 1}, step {batch_idx + 1}: {bad}. Learning "
            f"rates: {rates}.{largest} Learned values that are not finite: {', '.join(broken[:3]) or 'none'}"
        )

    def on_after_backward(self) -> None:
        """Drops the gradients of what the current stage does not train, and averages those that DDP does not.

        Blocks that fell back to round-to-nearest train nothing but their routers any more.
        """
        given_up = [self.block_at(index) for index in self.rounded]
        for block in self.blocks_in_training():
            for kind in self.rates:
                stays = not self.stage.trains(kind) or (block in given_up and kind != "routers")
                for parameter in block.parameters_of(kind):
                    if stays:
                        parameter.grad = None
                    elif kind == "weights" and self.trainer.world_size > 1 and parameter.grad is not None:
                        parameter.grad = self.trainer.strategy.reduce(parameter.grad, reduce_op="mean")

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keeps what is trained within the bounds of the stage."""
        if "clipping" in self.stage.train:
            for block in self.blocks_in_training():
                for linear in block.sliced_linears():
                    linear.scheme.bound_clipping()
        if "rounding" in self.stage.train:
            for scheme, weight in self._codes_in_training():
                scheme.bound_rounding(weight)

    @torch.no_grad()
    def begin_stage(self) -> None:
        """Begins the slice of the current stage, unless it is in training already, as after a resume or in a stage before."""
        optimizer = self.trainer.optimizers[0]
        if not self.stage.trains("weights") or self.stage.depth is None:
            return
        for scheme, weight in self._codes_in_training():
            if scheme.start_slice(weight, self.stage.depth):
                for parameter in scheme.code_parameters():  # the optimizer's averages were another slice's
                    optimizer.state.pop(parameter, None)

    @torch.no_grad()
    def end_stage(self) -> None:
        """Fixes the codes once no later stage moves them, and gives up what their training needed."""
        if self.current_epoch != self.segment.epochs.stop - 1 or not self.stage.trains("weights"):
            return
        if not self.schedule.trains_weights_after(self.segment):
            for scheme, weight in self._codes_in_training():
                scheme.freeze(weight)
                for parameter in scheme.code_parameters():
                    self.trainer.optimizers[0].state.pop(parameter, None)

    def _codes_in_training(self) -> Iterator[tuple[TrainableCodes, Tensor]]:
        """The schemes in training whose codes are trained, each with its weight (O, I) on the device."""
        for block in self.blocks_in_training():
            for linear in block.sliced_linears():
                if isinstance(linear.scheme, TrainableCodes):
                    yield linear.scheme, linear.sliced_weight().to(self.device)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One AdamW over all blocks: only the current block is in the graph, and AdamW skips what has no gradient."""
        blocks = [self.block_at(i) for i in range(len(self.blocks))]
        groups: list[dict[str, Any]] = []
        for kind, rate in self.rates.items():
            learned = [p for block in blocks for p in block.parameters_of(kind)]
            groups += [{"name": kind, "params": learned, "lr": rate, "full_lr": rate}] if learned else []
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def on_train_epoch_start(self) -> None:
        """Sets the learning rates of shares: half a cosine over the block's epochs, epoch by epoch."""
        if self.stage.share is not None:
            span = self.segment.span
            self._set_rates((self.current_epoch - span.start) / len(span))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets those of stages with epochs of their own, often few: half a cosine over them, step by step."""
        if self.stage.share is None:
            self._set_rates(self.progress(batch_idx))

    def _set_rates(self, position: float) -> None:
        """Learning rates at a position in [0, 1), times what a retry has lowered them by.

        A function of epoch and step alone, so that a resumed run takes the rates of the interrupted one.
        """
        factor = (
            self.stage.lr_scale * self.lr_scales.get(self.block_index, 1.0) * (1 + math.cos(math.pi * position)) / 2
        )
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["full_lr"] * factor
