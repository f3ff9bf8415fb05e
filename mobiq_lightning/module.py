"""The LightningModule: a frozen sliced LLaMA whose ranges and routers are calibrated block by block, then compared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mobiq_lightning.block_batch import ROUTED, BlockBatch
from mobiq_lightning.checks import check_plugins, check_strategy
from mobiq_lightning.data import TextWindows
from mobiq_lightning.errors import NonFiniteError
from mobiq_lightning.evaluation import Comparison
from mobiq_lightning.hidden_states import BlockCaller, HiddenStates, Reading, Storage, eval_mode
from mobiq_lightning.model_batch import ModelBatch
from mobiq_lightning.routed_input import RoutedInput, fixed_depth, full_precision, meet_budget
from mobiq_lightning.schedule import Schedule, Segment, Stage
from mobiq_lightning.shared_work import SharedWork
from mobiq_lightning.source import (
    BlockLayout,
    CalibratedBlock,
    Learned,
    RouterFactory,
    Share,
    SliceFactory,
    Source,
    check_finite,
    load_source,
)
from mobiq_lightning.strategies import LogitDistillation, NoTransform
from mobiq_lightning.strategies.base import BlockRun, BudgetSchedule, Objective
from mobiq_lightning.strategies.transform_base import Transform
from mobiq_lightning.transforming import fold_into_source


class ElasticCalibration(LightningModule):
    """Calibrates slices and routers of a frozen causal language model, block after block, and end to end if it fits.

    The epochs of a fit are divided among blocks and stages; which is current follows from the trainer's epoch, which a
    checkpoint restores. The source model is not registered here: its frozen weights are neither saved with
    training checkpoints nor moved to the device as a whole.

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
        super().__init__()
        self.pretrained, self.dtype_name = pretrained, dtype
        self.slices, self.router, self.budget, self.objective = slices, router, budget, objective
        self.epochs_per_block = epochs_per_block
        self.stages = stages or [Stage(1 / 3, ["slices"]), Stage(2 / 3, ["slices", "routers"])]
        self.model_objective = model_objective or LogitDistillation()
        self.recompute_blocks = recompute_blocks
        self.rates: dict[Learned, float] = {"slices": slices_lr, "weights": weights_lr}
        self.rates |= {"transforms": transform_lr, "routers": router_lr}
        self.transform = transform or NoTransform()
        self.share_routers, self.storage = share_routers, hidden_states
        self.layout = layout or BlockLayout()
        self.threshold_scope = threshold_scope
        self.eval_bits = eval_bits or [2, 2.5, 3, 3.5, 4, 5, 6, 8]
        self.random_seeds = random_seeds if random_seeds is not None else [0, 1, 2]
        self.shared_work = SharedWork(shared_work)
        self.blocks = nn.ModuleList()
        self.lr_scales: dict[int | None, float] = {}
        self.collapsed: dict[str, float] = {}
        self.layer_gains: dict[str, Any] | str = ""
        self.guards: list[dict[str, Any]] = []
        self.rounded: set[int] = set()
        self.comparison: Comparison | None = None
        self.hidden: HiddenStates | None = None
        # Not a module attribute: a registered backbone would be saved, moved and wrapped whole.
        self._backbone: list[Source] = []
        self._caller: list[BlockCaller] = []
        objectives = (objective, self.model_objective)
        check_plugins(slices, router, budget, objectives, epochs_per_block, self.stages, self.eval_bits, self.transform)

    # ------------------------------------------------------------------ set-up

    @property
    def source(self) -> Source:
        """The source model, loaded in `setup`."""
        return self._backbone[0]

    @property
    def caller(self) -> BlockCaller:
        """Calls the blocks of the source model."""
        return self._caller[0]

    @property
    def run_folder(self) -> Path:
        """Where this run writes."""
        return Path(self.trainer.default_root_dir)

    @property
    def hidden_states_folder(self) -> Path:
        """Where the tables lie if they are on disk; every rank has its own."""
        return self.run_folder / "hidden_states" / f"rank-{self.global_rank}"

    def setup(self, stage: str) -> None:
        """Loads the source model, puts sliced linears into its blocks and reads the text with its tokenizer."""
        check_strategy(self.trainer.strategy)
        if not self._backbone:
            self._backbone.append(load_source(self.pretrained, self.dtype_name))
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TextWindows):
            data.read(self.source.tokenizer, self.source.tokenizer_hash, stage, self.shared_work)
        if stage == "fit" and len(self.blocks) == 0:
            self.build_blocks()

    def identity(self) -> dict[str, str]:
        """What a resumed run must have in common with the interrupted one beside its recipe."""
        data: TextWindows = self.trainer.datamodule  # type: ignore[attr-defined]
        return {
            "source weights": self.source.fingerprint,
            "tokenizer": self.source.tokenizer_hash,
            "calibration tokens": data.calibration_digest,
        }

    def build_blocks(self) -> None:
        """Replaces the linears of the decoder blocks by sliced ones."""
        decoder = self.layout.find(self.source.model)
        groups = [self.layout.group_linears(block, self.share_routers) for block in decoder]
        for block, of_block in zip(decoder, groups, strict=True):
            check_finite(block, [name for names in of_block for name in names])
        fold_into_source(self.source, decoder, self.transform)
        for block, of_block in zip(decoder, groups, strict=True):
            self.blocks.append(CalibratedBlock(block, of_block, self.slices, self.router, self.transform))
        for position, routed in enumerate(self.all_inputs()):
            routed.router.place(position, len(self.all_inputs()))
        self.schedule = Schedule(self.stages, self.epochs_per_block, len(self.blocks))
        # Their sizes change while they are trained, which DDP's buckets cannot follow; their gradients are averaged here.
        sized = [n for n, _ in (*self.named_parameters(), *self.named_buffers()) if n.endswith((".target", ".codes"))]
        self._ddp_params_and_buffers_to_ignore = [n for n in sized if ".schemes." in n]

    def block_at(self, index: int) -> CalibratedBlock:
        """What is learned of decoder block `index`."""
        block = self.blocks[index]
        assert isinstance(block, CalibratedBlock)
        return block

    def all_inputs(self) -> list[RoutedInput]:
        """The routed inputs of all blocks, in order."""
        return [routed for index in range(len(self.blocks)) for routed in self.block_at(index).routed_inputs()]

    def input_names(self) -> list[str]:
        """Names of the routed inputs, as of `all_inputs`: the block and the first linear that reads the input."""
        return [
            f"{self.layout.blocks}.{index}.{key.replace('-', '.')}"
            for index in range(len(self.blocks))
            for key in self.block_at(index).inputs
        ]

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

    def make_caller(self) -> None:
        """Prepares calling single blocks."""
        if self._caller:
            self.caller.release()
        decoder = self.layout.find(self.source.model)
        # A block that is tried again after NaN or infinity is tried in float32.
        self._caller = [
            BlockCaller(
                self.source.model, list(decoder), self.device, {block for block in self.lr_scales if block is not None}
            )
        ]

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what guards have seen and done, and what is known of layer gains."""
        checkpoint |= {"collapsed": self.collapsed, "guards": self.guards, "rounded": sorted(self.rounded)}
        checkpoint["layer_gains"] = self.layer_gains

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it up again."""
        self.collapsed = dict(checkpoint.get("collapsed", {}))
        self.layer_gains = checkpoint.get("layer_gains", "")
        self.guards = list(checkpoint.get("guards", []))
        self.rounded = set(checkpoint.get("rounded", []))

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
        for linear in [linear for block in self.blocks_in_training() for linear in block.sliced_linears()]:
            if "clipping" in self.stage.train:
                linear.scheme.bound_clipping()
            if "rounding" in self.stage.train:
                linear.scheme.bound_rounding(linear.sliced_weight().to(self.device))

    @torch.no_grad()
    def begin_stage(self) -> None:
        """Begins the slice of the current stage, unless it is in training already, as after a resume or in a stage before."""
        optimizer = self.trainer.optimizers[0]
        for linear in [linear for block in self.blocks_in_training() for linear in block.sliced_linears()]:
            if not self.stage.trains("weights") or self.stage.depth is None:
                continue
            if linear.scheme.start_slice(linear.sliced_weight().to(self.device), self.stage.depth):
                for parameter in linear.scheme.weight_parameters():  # the optimizer's averages were another slice's
                    optimizer.state.pop(parameter, None)

    @torch.no_grad()
    def end_stage(self) -> None:
        """Fixes the codes once no later stage moves them, and gives up what their training needed."""
        if self.current_epoch != self.segment.epochs.stop - 1 or not self.stage.trains("weights"):
            return
        if not self.schedule.trains_weights_after(self.segment):
            for linear in [linear for block in self.blocks_in_training() for linear in block.sliced_linears()]:
                linear.scheme.freeze(linear.sliced_weight().to(self.device))
                for parameter in linear.scheme.weight_parameters():
                    self.trainer.optimizers[0].state.pop(parameter, None)

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

    # ------------------------------------------------------------------ validation

    def on_validation_start(self) -> None:
        """Loads the saved elastic checkpoint beside the source model, as it was before any transform was folded into it."""
        if self.source.config_changes is not None:
            self._caller.clear()
            self._backbone[0] = load_source(self.pretrained, self.dtype_name)
        self.comparison = Comparison.of_run(self, self.run_folder, self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Runs one batch through every arm of this pass of the comparison."""
        assert self.comparison is not None
        self.comparison.step(batch, dataloader_idx, batch_idx)

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Between the passes, hands the bits that the router used to the controls."""
        assert self.comparison is not None
        sizes = self.trainer.num_val_batches
        if dataloader_idx == 0 and batch_idx == int(sizes[0]) - 1:
            self.comparison.start_second_pass()
