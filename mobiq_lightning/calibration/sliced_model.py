"""What calibration and comparison share: a frozen model whose linears are sliced, and what is learned of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mobiq_lightning.calibration.apply_transform import fold_into_source
from mobiq_lightning.calibration.comparison_of_run import comparison_of_run
from mobiq_lightning.calibration.fit_checks import check_strategy
from mobiq_lightning.calibration.hidden_states import BlockCaller
from mobiq_lightning.evaluation import Comparison
from mobiq_lightning.nn import BlockLayout, CalibratedBlock, RoutedInput, RouterFactory, Share, SliceFactory
from mobiq_lightning.runs import GENERATED, HIDDEN_STATES, GainsSummary, GuardEvent, SharedWork
from mobiq_lightning.sources import Source, SourceWriter, TextWindows, check_finite, load_source
from mobiq_lightning.strategies.transform_base import Transform


class SlicedModel(LightningModule):
    """A frozen causal language model whose decoder linears are sliced: set-up, state and comparison.

    The source model is not registered here: its frozen weights are neither saved with training checkpoints nor moved to the
    device as a whole. What is registered are schemes, routers and transforms, block by block.

    Args:
        pretrained: Source model: a Hugging Face hub id, a local folder, or `builtin`.
        dtype: Of the source model: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        slices: Makes slice schemes.
        router: Makes routers.
        transform: What is done before slicing.
        share_routers: Whether linears that read the same input share a router.
        layout: Where the decoder blocks are.
        threshold_scope: Which threshold table the comparison uses.
        eval_bits: Budgets of the comparison, in bits.
        random_seeds: Seeds of the random allocation in the comparison.
        shared_work: Folder in which runs on the same model and text leave work for each other.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: Literal["auto", "float32", "bfloat16", "float16"],
        slices: SliceFactory,
        router: RouterFactory,
        transform: Transform,
        share_routers: Share,
        layout: BlockLayout | None,
        threshold_scope: Literal["layer", "global"],
        eval_bits: list[float] | None,
        random_seeds: list[int] | None,
        shared_work: str | None,
    ) -> None:
        super().__init__()
        self.pretrained, self.dtype_name = pretrained, dtype
        self.slices, self.router, self.transform = slices, router, transform
        self.share_routers = share_routers
        self.layout = layout or BlockLayout()
        self.threshold_scope = threshold_scope
        self.eval_bits = eval_bits or [2, 2.5, 3, 3.5, 4, 5, 6, 8]
        self.random_seeds = random_seeds if random_seeds is not None else [0, 1, 2]
        self.shared_work = SharedWork(shared_work)
        self.blocks = nn.ModuleList()
        self.lr_scales: dict[int | None, float] = {}
        self.collapsed: dict[str, float] = {}
        self.layer_gains: GainsSummary | str = ""
        self.guards: list[GuardEvent] = []
        self.rounded: set[int] = set()
        self.comparison: Comparison | None = None
        # Not a module attribute: a registered backbone would be saved, moved and wrapped whole.
        self._backbone: list[Source] = []
        self._caller: list[BlockCaller] = []

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
        return self.run_folder / HIDDEN_STATES / f"rank-{self.global_rank}"

    def setup(self, stage: str) -> None:
        """Loads the source model, puts sliced linears into its blocks and reads the text with its tokenizer."""
        check_strategy(self.trainer.strategy)
        if not self._backbone:
            self._backbone.append(load_source(self.pretrained, self.dtype_name))
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TextWindows):
            data.read(self.source.tokenizer, self.source.tokenizer_hash, stage, self.shared_work, self.write_text)
        if stage == "fit" and len(self.blocks) == 0:
            self.build_blocks()

    def write_text(self, n_tokens: int, seq_len: int, seed: int) -> list[int]:
        """Text of the source model, see `SourceWriter.write`: written by one process for all, and kept for a resume."""
        strategy = self.trainer.strategy
        kept = self.shared_work if self.shared_work.folder is not None else SharedWork(self.run_folder / GENERATED)
        writer = SourceWriter(self.source, strategy.root_device, kept)
        written: list[int] = strategy.broadcast(
            writer.write(n_tokens, seq_len, seed) if self.trainer.is_global_zero else []
        )
        return written

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

    # ------------------------------------------------------------------ state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what guards have seen and done, and what is known of layer gains."""
        checkpoint |= {"collapsed": self.collapsed, "rounded": sorted(self.rounded)}
        checkpoint["guards"] = [event.to_json() for event in self.guards]
        gains = self.layer_gains
        checkpoint["layer_gains"] = gains if isinstance(gains, str) else gains.to_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it up again."""
        self.collapsed = dict(checkpoint.get("collapsed", {}))
        where, gains = "the training checkpoint", checkpoint.get("layer_gains", "")
        self.layer_gains = gains if isinstance(gains, str) else GainsSummary.from_json(gains, where, "layer_gains")
        self.guards = [GuardEvent.from_json(event, where, "guards") for event in checkpoint.get("guards", [])]
        self.rounded = set(checkpoint.get("rounded", []))

    # ------------------------------------------------------------------ validation

    def on_validation_start(self) -> None:
        """Loads the saved elastic checkpoint beside the source model, as it was before any transform was folded into it."""
        if self.source.config_changes is not None:
            self._caller.clear()
            self._backbone[0] = load_source(self.pretrained, self.dtype_name)
        self.comparison = comparison_of_run(self, self.run_folder, self.device)

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
