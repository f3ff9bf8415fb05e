"""The windows of text of a run: the data module of its trainer, and what the source model writes for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from mobiq_lightning.calibration.planning import WRITING, begin_clock, begin_comparison_clock
from mobiq_lightning.errors import DataError
from mobiq_lightning.runs import GENERATED, SharedWork
from mobiq_lightning.sources import Source, SourceWriter, Tell, TextWindows, Write

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration


def text_of(trainer: Trainer) -> TextWindows:
    """The windows of text that a trainer was given.

    Raises:
        DataError: If the trainer has another data module, or none.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, TextWindows):
        given = "no data module" if data is None else f"a {type(data).__module__}.{type(data).__qualname__}"
        raise DataError(
            f"the trainer was given {given}; ElasticCalibration reads its text with the tokenizer of the source model, so it "
            "takes a mobiq_lightning.sources.TextWindows, or a subclass of it, as datamodule"
        )
    return data


def read_text(module: ElasticCalibration, stage: str) -> None:
    """Reads the text of a run with the tokenizer of its model; the plan is said before the model writes some of it.

    Args:
        module: Holds the loaded source model.
        stage: Stage of the trainer.
    """
    source, clock = module.sliced.source, module.clock

    def tell(done: int, of: int, timed: bool) -> None:
        if timed:
            clock.step(WRITING, done, of)
        else:
            clock.skip(WRITING, done, of)

    write = writing_once(source, module.trainer, module.shared_work, tell)

    def planned(n_tokens: int, seq_len: int, seed: int) -> list[int]:
        begin_clock(module)
        written = write(n_tokens, seq_len, seed)
        clock.end(WRITING)
        return written

    module.text.read(source.tokenizer, source.tokenizer_hash, stage, module.shared_work, planned, source.n_embeddings)
    if stage == "fit":
        begin_clock(module)
    else:
        begin_comparison_clock(module)


def writing_once(source: Source, trainer: Trainer, shared: SharedWork, tell: Tell | None = None) -> Write:
    """Lets the source model write text, by one process for all, and kept for a resume.

    Args:
        source: The source model.
        trainer: Knows the device, the other processes and the run folder.
        shared: Where runs on the same model leave text for each other; without a folder it is kept in the run folder.
        tell: Function that is told how much is written.
    """
    kept = shared if shared.folder is not None else SharedWork(Path(trainer.default_root_dir) / GENERATED)

    def write(n_tokens: int, seq_len: int, seed: int) -> list[int]:
        writer = SourceWriter(source, trainer.strategy.root_device, kept, tell)
        written: list[int] = trainer.strategy.broadcast(
            writer.write(n_tokens, seq_len, seed) if trainer.is_global_zero else []
        )
        return written

    return write
