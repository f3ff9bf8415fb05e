"""Results of several comparisons of one run: what is measured again replaces itself, all else stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mobiq_lightning.files import write_json
from mobiq_lightning.runs import (
    Addition,
    Allocation,
    Basis,
    BlockErrorNote,
    BudgetUse,
    CalibrationText,
    Diagnostics,
    EvalProtocol,
    InputSize,
    Measured,
    Results,
    Row,
    SlicesNote,
    merged,
    merged_diagnostics,
    merged_speed,
    place_of,
)

PROTOCOL = EvalProtocol("packed", 128, 8, True, "t", "text", "h", 1000, CalibrationText("text", 8, 128, 0))
SLICES = SlicesNote((2, 1), 0.5, 0.1, "layer")


def row(allocation: Allocation, bits: float, perplexity: float = 10.0, seed: int | None = None) -> Row:
    return Row(allocation, bits, bits, bits + 0.5, perplexity, kl=0.1, seed=seed)


def measured(*rows: Row, date: str = "first", **changes: Any) -> Measured:
    given = {"slices": SLICES, "checkpoint": "c", "dtype": "float32", **changes}
    return Measured("m", PROTOCOL, {"date": date}, rows, **given)


FULL = row("full", 32)
FIRST = measured(FULL, row("rtn", 2, 14), row("router", 2, 12, 0), row("random", 2, 13, 0), row("random", 2, 13, 1))


def test_a_row_replaces_itself_and_all_others_stay() -> None:
    again = measured(FULL, row("router", 2, 11, 7), row("random", 2, 15, 1), row("router", 3, 10, 7), date="second")
    both = merged(FIRST, again)
    assert [(r.allocation, r.target_bits, r.perplexity, r.seed) for r in both.rows] == [
        ("full", 32, 10, None),
        ("rtn", 2, 14, None),
        ("router", 2, 11, 7),
        ("router", 3, 10, 7),
        ("random", 2, 13, 0),
        ("random", 2, 15, 1),
    ]
    assert both.environment == {"date": "first"}
    assert both.additions == (Addition({"date": "second"}, (2, 3)),)
    third = merged(both, measured(FULL, row("router", 2, 9), date="third"))
    assert third.additions == (Addition({"date": "second"}, (3,)), Addition({"date": "third"}, (2,)))


def test_what_was_measured_anew_as_a_whole_is_of_one_comparison() -> None:
    again = replace(FIRST, environment={"date": "second"})
    assert merged(FIRST, again) == again
    assert merged(None, again) == again


def test_what_is_not_known_to_differ_is_one_protocol() -> None:
    new = Basis.of(FIRST)
    assert new.differences(new) == []
    old = Basis.of(replace(FIRST, slices=None, dtype=None, checkpoint=None))
    assert old.differences(new) == []
    assert old.is_of_checkpoint(new)
    assert not replace(new, checkpoint="d").is_of_checkpoint(new)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threshold_scope": "global"}, "threshold scope global (not layer)"),
        ({"dtype": "bfloat16"}, "dtype bfloat16 (not float32)"),
        (
            {"protocol": replace(PROTOCOL, data_hash="i")},
            "text, tokens i, 1000 of them scored (not text, tokens h, 1000 of them scored)",
        ),
        ({"protocol": replace(PROTOCOL, window=64)}, "window 64 (not 128)"),
    ],
)
def test_another_protocol_has_a_folder_of_its_own(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    known = Basis.of(FIRST)
    new = replace(known, **change)
    assert place_of(tmp_path, new) == tmp_path  # nothing is there yet
    write_json(tmp_path / "results.json", Results(FIRST).to_json())
    assert place_of(tmp_path, known) == tmp_path
    assert known.differences(new) == [said]
    beside = place_of(tmp_path, new)
    assert beside == tmp_path / "other_protocols" / new.folder_name
    assert new.folder_name != known.folder_name
    assert place_of(tmp_path, replace(new, checkpoint="d")) == tmp_path  # what is there is of another checkpoint


def test_another_name_of_the_same_text_is_the_same_text(tmp_path: Path) -> None:
    write_json(tmp_path / "elastic" / "results.json", Results(FIRST).to_json())  # the run itself lost its own
    renamed = replace(Basis.of(FIRST), protocol=replace(PROTOCOL, data="/elsewhere/text.txt"))
    assert place_of(tmp_path, renamed) == tmp_path
    assert replace(renamed, protocol=replace(renamed.protocol, data="../a b/ü.txt")).folder_name.startswith("text-")


def test_speeds_of_one_machine_stay_beyond_the_budgets_that_were_measured_now() -> None:
    def stored(device: str, path: str, *bits: float) -> dict[str, Any]:
        return {"environment": {"device": device, "path": path}, "rows": [{"bits": b, "n": len(bits)} for b in bits]}

    both = merged_speed(stored("cpu", "reference", 2, 3, 4, 8), stored("cpu", "reference", 4, 2.5))
    assert both is not None
    assert [(r["bits"], r["n"]) for r in both["rows"]] == [(2, 4), (2.5, 2), (4, 2), (8, 4)]
    assert merged_speed(stored("cpu", "reference", 2), stored("gpu", "reference", 8)) is None
    assert merged_speed(stored("gpu", "reference", 2), stored("gpu", "kernels", 8)) is None


def test_diagnostics_of_the_same_inputs_are_put_together() -> None:
    def found(name: str, *budgets: float) -> Diagnostics:
        uses = tuple(BudgetUse(bits, (bits,), ((1.0,),), (), ()) for bits in budgets)
        return Diagnostics((InputSize(name, 4),), (2,), uses, BlockErrorNote(8, ((0.1,),)))

    both = merged_diagnostics(found("q", 2, 8), found("q", 8, 3))
    assert both is not None
    assert [use.target_bits for use in both.budgets] == [2, 3, 8]
    assert merged_diagnostics(found("q", 2), found("k", 8)) is None
