"""Calibration windows that the full-precision model writes itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mobiq_lightning.errors import DataError, ModelError
from mobiq_lightning.runs import SharedWork
from mobiq_lightning.sources import Source, SourceWriter, TextWindows, generated_text, load_source

Make = Callable[..., Path]


@pytest.fixture
def source(make_model: Make) -> Source:
    return load_source(str(make_model()), "float32")


def writer_of(source: Source, kept: Path | None = None) -> SourceWriter:
    return SourceWriter(source, torch.device("cpu"), SharedWork(kept))


def windows(source: Source, text_file: Path, **arguments: int) -> TextWindows:
    data = TextWindows(str(text_file), str(text_file), n_samples=6, seq_len=32, **arguments)
    data.read(source.tokenizer, source.tokenizer_hash, "fit", write=writer_of(source).write)
    return data


def test_windows_that_the_model_wrote_follow_those_of_the_text(source: Source, text_file: Path) -> None:
    text, more, again, other = (
        windows(source, text_file, n_generated=n, seed=seed) for n, seed in ((0, 0), (5, 0), (5, 0), (5, 1))
    )
    assert more.calibration_ids().shape == (11, 32)
    assert torch.equal(more.calibration_ids()[:6], text.calibration_ids())
    assert torch.equal(more.calibration_ids(), again.calibration_ids())
    assert not torch.equal(more.calibration_ids()[6:], other.calibration_ids()[6:])
    assert text.calibration_digest != more.calibration_digest == again.calibration_digest
    assert more.protocol.calibration.n_generated == 5


def test_the_text_is_drawn_from_the_models_own_distribution(source: Source) -> None:
    ids = writer_of(source).write(20_000, 16, seed=0)
    first = torch.tensor([after for before, after in itertools.pairwise(ids) if before == 1])  # after each BOS
    with torch.no_grad():
        wanted = source.model(torch.tensor([[1]])).logits[0, 0].softmax(-1)
    seen = torch.bincount(first, minlength=len(wanted)) / len(first)
    expected_distance = (wanted * (1 - wanted) / len(first)).sqrt().sum()
    assert (seen - wanted).abs().sum() < expected_distance
    assert wanted.max() > 2 / len(wanted), "a model without preferences would prove nothing"


def test_documents_begin_with_bos_and_are_cut_before_eos(source: Source) -> None:
    ids = writer_of(source).write(5_000, 16, seed=0)
    assert len(ids) >= 5_000
    assert ids[0] == 1
    assert 2 not in ids
    begun = [i for i, token in enumerate(ids) if token == 1]
    lengths = [b - a for a, b in itertools.pairwise(begun)]
    assert max(lengths) == 16
    assert min(lengths) < 16, "no document ended by itself"


def test_a_writer_that_was_interrupted_goes_on_after_the_last_batch(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated_text, "CPU_CACHE_BYTES", 30_000)  # seven documents at a time
    whole = writer_of(source).write(600, 16, seed=3)
    write, batches = SourceWriter._documents, []

    def interrupted(*arguments: object) -> list[list[int]]:
        batches.append(arguments)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(SourceWriter, "_documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer_of(source, tmp_path).write(600, 16, seed=3)
    assert len(list(tmp_path.iterdir())) == 2
    assert writer_of(source, tmp_path).write(600, 16, seed=3) == whole
    done = len(batches)
    assert writer_of(source, tmp_path).write(600, 16, seed=3) == whole
    assert len(batches) == done, "nothing was left to write"


def test_a_model_whose_cache_is_larger_than_the_limit_writes_one_document_at_a_time(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated_text, "CPU_CACHE_BYTES", 1)
    assert len(writer_of(source).write(40, 16, seed=0)) >= 40


def test_writing_leaves_random_numbers_of_the_run_alone(source: Source) -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    writer_of(source).write(100, 16, seed=5)
    assert torch.equal(torch.rand(3), wanted)


def test_a_tokenizer_without_a_beginning_is_an_error(source: Source) -> None:
    source.tokenizer.bos_token = source.tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"data\.n_generated: .* neither BOS nor EOS.*Set data\.n_generated to 0"):
        writer_of(source).write(100, 16, seed=0)


def test_a_model_that_writes_nothing_is_an_error_and_not_a_loop(make_model: Make) -> None:
    source = load_source(str(make_model(tied=False)), "float32")
    with torch.no_grad():
        hidden = source.model(torch.tensor([[1]]), output_hidden_states=True).hidden_states[-1][0, 0]
        source.model.lm_head.weight.zero_()
        source.model.lm_head.weight[2] = 1e4 * hidden
    with pytest.raises(DataError, match=r"ends its texts at once: \d+ of them have \d+ tokens"):
        writer_of(source).write(1_000, 16, seed=0)


def test_progress_is_told_of_tokens_that_were_kept_and_of_those_that_are_written(
    source: Source, tmp_path: Path
) -> None:
    told: list[tuple[int, int, bool]] = []
    writer = SourceWriter(source, torch.device("cpu"), SharedWork(tmp_path), lambda *what: told.append(what))
    writer.write(100, 16, seed=0)
    assert told[0] == (0, 100, False)
    assert all(of == 100 for _, of, _ in told)
    done = [tokens for tokens, _, _ in told]
    assert done == sorted(done)
    assert len({tokens for tokens, _, timed in told if timed}) > 3, "batch by batch alone would be silent for long"
    told.clear()
    writer.write(100, 16, seed=0)
    assert told
    assert not any(timed for _, _, timed in told), "what was kept takes no time to write"


def test_fewer_than_none_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.n_generated \(-1\) must be at least 0"):
        TextWindows(n_generated=-1)


def test_logits_that_nothing_can_be_sampled_from_are_refused_with_the_dtype(make_model: Make) -> None:
    source = load_source(str(make_model(dtype=torch.float16, tied=False)))
    with torch.no_grad():
        source.model.lm_head.weight.mul_(3e4)
    with pytest.raises(ModelError, match=r"logits that are NaN or infinite in float16.*model\.dtype bfloat16"):
        writer_of(source).write(100, 16, seed=0)
