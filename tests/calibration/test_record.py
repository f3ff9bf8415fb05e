"""What a calibration remembers beside what it has learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mobiq_lightning.calibration.fit_checks import check_processes
from mobiq_lightning.calibration.record import CalibrationRecord
from mobiq_lightning.errors import RunFolderError
from mobiq_lightning.runs import GainsSummary, GuardEvent, GuardName


def event(name: str, guard: GuardName = "collapsed_router") -> GuardEvent:
    return GuardEvent(guard, block=0, input=name, action="repair", epoch=1, depth=2.5, value=None, limit=0.995)


GAINS = GainsSummary(windows=8, seq_len=32, reference_bits=4, seconds=1.5, methods={}, tokens=None)


def filled() -> CalibrationRecord:
    record = CalibrationRecord()
    record.note_guard(event("a"))
    record.note_guard(event("b"))
    record.note_guard(event("b", guard="worse_block"))
    record.note_collapse("a", 0.997)
    record.note_layer_gains(GAINS)
    for block in (3, 1):
        record.give_up(block)
    return record


def test_what_a_training_checkpoint_keeps_comes_back() -> None:
    state = json.loads(json.dumps(filled().state_dict()))  # plain values
    assert state["given_up"] == [1, 3]
    restored = CalibrationRecord()
    restored.load_state_dict(state)
    assert restored == filled()


def test_tries_are_those_of_the_run_folder_and_not_of_the_checkpoint() -> None:
    record = filled()
    record.lower_rates(2, 0.2)
    record.lower_rates(None, 0.04)
    assert (record.rate_factor(2), record.rate_factor(None), record.rate_factor(0)) == (0.2, 0.04, 1.0)
    assert record.retried_blocks == {2}
    record.load_state_dict(filled().state_dict())
    assert record.rate_factor(2) == 0.2


def test_the_largest_share_of_a_collapsed_router_is_kept() -> None:
    record = CalibrationRecord()
    for share in (0.996, 0.999, 0.998):
        record.note_collapse("a", share)
    assert record.collapsed == {"a": 0.999}


def test_an_input_that_keeps_its_router_was_not_repaired() -> None:
    record = filled()
    record.keep_routers(static={"a"})
    assert [e.action for e in record.guards] == ["repair", "record", "repair"]


def test_a_run_of_another_number_of_processes_is_not_gone_on_with() -> None:
    said = "runs/a holds a run of 1 processes, and this one has 2: a step would be of 8 windows in place of 4"
    with pytest.raises(RunFolderError, match=said):
        check_processes(1, 2, 4, Path("runs/a"))
    check_processes(2, 2, 4, Path("runs/a"))
