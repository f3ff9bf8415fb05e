"""Every family of the zoo is exact block by block and goes the whole way, or is refused by name; the documentation says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families import EXACT, FAMILIES, REFUSED, ROUNDINGS, ROWS, Family, cells, difference_of_logits
from mobiq_lightning.errors import ModelError
from tests.conftest import make_tokenizer, small_recipe

ROOT = Path(__file__).parents[2]
REFUSALS = {
    "Gemma 3n (text)": r"passes per_layer_input to block 1/2",
    "GPT-2": r"hold no nn\.Linear",
    "BLOOM": r"cannot be called one at a time: .*how many windows",
    "XGLM": r"cannot be called one at a time: .*how many windows",
    "Mamba": r"never call mixer\.dt_proj",
    "Jamba": r"never call mamba\.dt_proj",
}
WORKING = [family for family in FAMILIES if family.name not in REFUSALS]
WHOLE = list({family.config: family for family in WORKING}.values())
"""One of each class; what differs within a class is between blocks, which the first test looks at."""
SHORT = [
    "--model.epochs_per_block=1",
    "--model.stages=[{share: 1, train: [ranges, routers]}]",
    "--model.eval_bits=[3, 8]",
    "--data.n_samples=2",
    "--data.batch_size=2",
    "--data.seq_len=16",
    "--data.eval_seq_len=32",
    "--data.eval_max_windows=2",
]


def name_of(family: Family) -> str:
    return family.name


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.mark.parametrize("family", WORKING, ids=name_of)
def test_blocks_called_one_at_a_time_give_the_logits_of_the_model(family: Family) -> None:
    difference, largest = difference_of_logits(family.tiny())
    assert difference <= ROUNDINGS * torch.finfo(torch.float32).eps * largest


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in REFUSALS], ids=name_of)
def test_what_cannot_work_is_refused_by_name(family: Family) -> None:
    with pytest.raises(ModelError, match=REFUSALS[family.name]):
        difference_of_logits(family.tiny())


@pytest.mark.parametrize("family", WHOLE, ids=name_of)
def test_a_family_goes_the_whole_way(family: Family, tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    import mobiq_lightning
    from mobiq_lightning.cli import main

    model = family.tiny()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(["fit", *small_recipe(tmp_path / "model", text_file, tmp_path), *SHORT, "--quiet"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    row = next(row for row in results["rows"] if (row["allocation"], row["target_bits"]) == ("router", 8))
    assert row["kl"] < 0.05
    assert results["slices"]["sliced_share"] > 0.9
    elastic: Any = mobiq_lightning.load(tmp_path / "run")
    ids = torch.tensor([[1, 5, 9, 13], [1, 17, 21, 25]])
    written = elastic.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, bits=[2, 5])
    assert written.shape == (2, 7)
    low, high = elastic.bits_used().per_row
    assert low == 2
    assert high > 2


def test_the_rows_are_those_of_the_families_as_they_are_now() -> None:
    rows = json.loads(ROWS.read_text())["rows"]
    assert [row["family"] for row in rows] == [family.name for family in FAMILIES]
    assert {row["family"]: row["result"] for row in rows} == {
        family.name: REFUSED if family.name in REFUSALS else EXACT for family in FAMILIES
    }


def test_the_table_of_the_documentation_is_that_of_the_rows() -> None:
    text = (ROOT / "docs" / "families.md").read_text()
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)[2:]]
    assert shown == [cells(row) for row in json.loads(ROWS.read_text())["rows"]]
