"""The windows of text of a run: the data module of its trainer, and what the source model writes for it."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer

from mobiq_lightning.errors import DataError
from mobiq_lightning.runs import GENERATED, SharedWork
from mobiq_lightning.sources import Source, SourceWriter, TextWindows, Write


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


def writing_once(source: Source, trainer: Trainer, shared: SharedWork) -> Write:
    """Lets the source model write text, by one process for all, and kept for a resume.

    Args:
        source: The source model.
        trainer: Knows the device, the other processes and the run folder.
        shared: Where runs on the same model leave text for each other; without a folder it is kept in the run folder.
    """
    kept = shared if shared.folder is not None else SharedWork(Path(trainer.default_root_dir) / GENERATED)

    def write(n_tokens: int, seq_len: int, seed: int) -> list[int]:
        writer = SourceWriter(source, trainer.strategy.root_device, kept)
        written: list[int] = trainer.strategy.broadcast(
            writer.write(n_tokens, seq_len, seed) if trainer.is_global_zero else []
        )
        return written

    return write
