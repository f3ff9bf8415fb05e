"""The LightningModule: a frozen sliced LLaMA whose ranges and routers are calibrated block by block, then compared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
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
from mobiq_lightning.routed_input import RoutedInput, fixed_depth, full_precision, meet_budget
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
from mobiq_lightning.strategies import NoTransform
from mobiq_lightning.strategies.base import BudgetSchedule, Objective
from mobiq_lightning.strategies.transform_base import Transform
from mobiq_lightning.transforming import fold_into_source

Trained = Literal["slices", "routers"]


@dataclass
class Stage:
    """A part of a block's epochs.

    Args:
        share: Of the block's epochs, in (0, 1].
        train: What is trained: `slices` (what slice schemes and transforms learn), `routers`, or both.
    """

    share: float
    train: list[Trained]


class ElasticCalibration(LightningModule):
    """Calibrates slices and routers of a frozen causal language model, one decoder block after the other.

    The epochs of a fit are divided among the blocks; which block and stage is current follows from the trainer's epoch,
    which a checkpoint restores. The source model is not registered here: its frozen weights are neither saved with
    training checkpoints nor moved to the device as a whole.

    Args:
        pretrained: Source model: a Hugging Face hub id, a local folder, or `builtin` (a small LLaMA that is trained once,
            offline, and cached).
        slices: How weights are cut into slices; built for every linear from (out_features, in_features).
        router: What scores tokens; built for every routed input from (in_features, n_slices).
        budget: Average bits asked for, over the progress through a block.
        objective: What a block is trained to match.
        epochs_per_block: Passes over the calibration windows for each decoder block.
        stages: How a block's epochs are divided. Default: the first third trains the slices at fixed depths, the rest
            slices and routers together.
        slices_lr: Learning rate of what the slice scheme learns.
        router_lr: Learning rate of the routers.
        share_routers: `input`: linears that read the same input share a router. `linear`: each has its own.
        dtype: Of the source model: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        hidden_states: Where inputs and targets of the current block lie: `device`, `host` or `disk`.
        layout: Where the decoder blocks are, for models that are not laid out like LLaMA.
        threshold_scope: `layer`: every input meets the budget by itself. `global`: one threshold for all inputs.
        eval_bits: Budgets, in bits, at which the result is compared.
        random_seeds: Seeds of the random allocation in the comparison.
        transform: What is done to weights and inputs before weights are sliced; by default nothing.
        transform_lr: Learning rate of what the transform learns.
        shared_work: Folder in which runs on the same model and text leave tokens and uncalibrated rows for each other.
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
    ) -> None:
        super().__init__()
        self.pretrained, self.dtype_name = pretrained, dtype
        self.slices, self.router, self.budget, self.objective = slices, router, budget, objective
        self.epochs_per_block = epochs_per_block
        self.stages = stages or [Stage(1 / 3, ["slices"]), Stage(2 / 3, ["slices", "routers"])]
        self.rates: dict[Learned, float] = {"slices": slices_lr, "routers": router_lr, "transforms": transform_lr}
        self.transform = transform or NoTransform()
        self.share_routers, self.storage = share_routers, hidden_states
        self.layout = layout or BlockLayout()
        self.threshold_scope = threshold_scope
        self.eval_bits = eval_bits or [2, 2.5, 3, 3.5, 4, 5, 6, 8]
        self.random_seeds = random_seeds if random_seeds is not None else [0, 1, 2]
        self.shared_work = SharedWork(shared_work)
        self.blocks = nn.ModuleList()
        self.lr_scales: dict[int, float] = {}
        self.collapsed: dict[str, float] = {}
        self.comparison: Comparison | None = None
        self.hidden: HiddenStates | None = None
        # Not a module attribute: a registered backbone would be saved, moved and wrapped whole.
        self._backbone: list[Source] = []
        self._caller: list[BlockCaller] = []
        shares = [stage.share for stage in self.stages]
        check_plugins(slices, router, budget, objective, epochs_per_block, shares, self.eval_bits, self.transform)

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
        """Prepares the tables of block 0 from calibration windows (N, T)."""
        decoder = self.layout.find(self.source.model)
        # A block that is tried again after NaN or infinity is tried in float32.
        self._caller = [BlockCaller(self.source.model, list(decoder), self.device, set(self.lr_scales))]
        streams: dict[str, Reading] = {ROUTED: self._read_routed}
        streams |= {str(depth): self._read_at(depth) for depth in self.objective.depths}
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
    def block_index(self) -> int:
        """The block being calibrated."""
        return min(self.current_epoch // self.epochs_per_block, len(self.blocks) - 1)

    @property
    def stage(self) -> Stage:
        """The current stage of that block."""
        done = (self.current_epoch % self.epochs_per_block) / self.epochs_per_block
        end = 0.0
        for stage in self.stages:
            end += stage.share
            if done < end - 1e-6:
                return stage
        return self.stages[-1]

    def progress(self, batch_idx: int) -> float:
        """Progress through the block in [0, 1], before the step of `batch_idx`."""
        steps = int(self.trainer.num_training_batches)
        step = (self.current_epoch % self.epochs_per_block) * steps + batch_idx
        return step / max(1, self.epochs_per_block * steps - 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step on a batch of calibration windows.

        Raises:
            NonFiniteError: If a term of the loss is NaN or infinite.
        """
        block = self.block_index
        for router in self.block_at(block).routers():
            router.reseed(self.global_step)
            router.temperature = 1.0 - 0.9 * self.progress(batch_idx)
        assert self.hidden is not None
        run = BlockBatch(self.block_at(block), block, self.caller, self.hidden, batch["index"])
        target_bits = self.budget(self.progress(batch_idx))
        retried = block in self.lr_scales
        with torch.autocast(self.device.type, enabled=False) if retried else nullcontext():
            terms = self.objective(run, target_bits, "routers" in self.stage.train)
        if not all(bool(torch.isfinite(value)) for value in terms.values()):
            raise NonFiniteError(self._describe_non_finite(block, batch_idx, terms, run), block)
        logged: dict[str, Any] = {f"block/{name}": value.detach() for name, value in terms.items()}
        logged |= {"block/index": float(block), "block/target_bits": target_bits}
        self.log_dict(logged, on_step=True, on_epoch=True, sync_dist=self.trainer.world_size > 1)
        return terms["loss"]

    def _describe_non_finite(self, block: int, batch_idx: int, terms: dict[str, Tensor], run: BlockBatch) -> str:
        bad = ", ".join(f"{name} = {value.item()}" for name, value in terms.items() if not torch.isfinite(value))
        calibrated = self.block_at(block)
        broken = [name for name, p in calibrated.named_parameters() if not bool(torch.isfinite(p).all())]
        largest = max(float(run.inputs(name).abs().max()) for name in self.hidden.inputs)  # type: ignore[union-attr]
        rates = ", ".join(f"{g['name']} {g['lr']:.2g}" for g in self.trainer.optimizers[0].param_groups)
        return (
            f"block {block + 1}/{len(self.blocks)}, epoch {self.current_epoch % self.epochs_per_block + 1}, step "
            f"{batch_idx + 1}: {bad}. Learning rates: {rates}. Largest input of the block: {largest:.4g}. Learned "
            f"values that are not finite: {', '.join(broken[:3]) or 'none'}"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what is known of collapsed routers."""
        checkpoint["collapsed"] = self.collapsed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it up again."""
        self.collapsed = dict(checkpoint.get("collapsed", {}))

    def on_after_backward(self) -> None:
        """Drops the gradients of what the current stage does not train."""
        block = self.block_at(self.block_index)
        for kind in self.rates:
            if ("slices" if kind == "transforms" else kind) not in self.stage.train:
                for parameter in block.parameters_of(kind):
                    parameter.grad = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One AdamW over all blocks: only the current block is in the graph, and AdamW skips what has no gradient."""
        blocks = [self.block_at(i) for i in range(len(self.blocks))]
        groups: list[dict[str, Any]] = []
        for kind, rate in self.rates.items():
            learned = [p for block in blocks for p in block.parameters_of(kind)]
            groups += [{"name": kind, "params": learned, "lr": rate, "full_lr": rate}] if learned else []
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def on_train_epoch_start(self) -> None:
        """Sets the learning rates: half a cosine over the block's epochs, times what a retry of it has lowered it by.

        A function of the epoch alone, so that a resumed run takes the rates of the interrupted one.
        """
        position = (self.current_epoch % self.epochs_per_block) / self.epochs_per_block
        factor = self.lr_scales.get(self.block_index, 1.0) * (1 + math.cos(math.pi * position)) / 2
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
