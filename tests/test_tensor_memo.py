"""A value that is kept of a tensor: when it is still true, and that it keeps nothing alive."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mobiq_lightning.tensor_memo import TensorMemo


class Counted:
    """Sums a tensor and counts how often it was asked to."""

    def __init__(self, memo: TensorMemo[Tensor]) -> None:
        self.memo, self.calls = memo, 0

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.memo.get(tensor, lambda: self.make(tensor))

    def make(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        return tensor.detach().sum()


@pytest.fixture
def counted() -> Counted:
    return Counted(TensorMemo())


def test_the_same_tensor_is_worked_on_once_and_another_one_anew(counted: Counted) -> None:
    x = torch.ones(3)
    assert counted(x) is counted(x)
    assert counted.calls == 1
    assert float(counted(torch.ones(4))) == 4.0
    assert float(counted(x)) == 3.0
    assert counted.calls == 3, "one value is kept, the last"


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mul_(2),
        lambda x: x[1:].mul_(2),  # through a view
        lambda x: setattr(x, "data", x.detach() * 2),  # as modules are moved; no version counts it
    ],
    ids=["in place", "in a view of it", "by exchange of its data"],
)
def test_a_change_of_the_tensor_is_noticed(counted: Counted, change: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3)
    before = counted(x)
    change(x)
    assert float(counted(x)) == float(x.sum()) != float(before)


def test_a_change_while_the_value_is_made_is_noticed() -> None:
    memo: TensorMemo[float] = TensorMemo()
    x = torch.ones(3)

    def make() -> float:
        found = float(x.sum())
        x.mul_(2)
        return found

    assert [memo.get(x, make), memo.get(x, make)] == [3.0, 6.0]


@pytest.mark.parametrize(("trust", "calls"), [(True, 1), (False, 2)])
def test_tensors_that_do_not_count_their_changes_are_trusted_or_not(trust: bool, calls: int) -> None:
    counted = Counted(TensorMemo(trust_uncounted=trust))
    with torch.inference_mode():
        x = torch.ones(3)
        assert float(counted(x)) == float(counted(x)) == 3.0
    assert counted.calls == calls


def test_tensors_without_an_address_are_taken_too(counted: Counted) -> None:
    def twice(x: Tensor) -> Tensor:
        return counted(x) * 0 + counted(x) * 0 + x.sum()

    assert torch.equal(torch.func.grad(twice)(torch.ones(3)), torch.ones(3))
    assert counted.calls == 1


def test_neither_the_tensor_nor_its_value_is_kept_alive(counted: Counted) -> None:
    gc.disable()  # what goes must go at once, not when circles are collected
    try:
        x = torch.ones(3)
        tensor, value = weakref.ref(x), weakref.ref(counted(x))
        assert value() is not None
        del x
        assert tensor() is None
        assert value() is None
        y = torch.ones(3)
        memo, kept = weakref.ref(counted.memo), weakref.ref(counted(y))
        del counted.memo
        assert memo() is None
        assert kept() is None
    finally:
        gc.enable()


def test_a_tensor_that_goes_takes_no_later_value_with_it(counted: Counted) -> None:
    x, y = torch.ones(3), torch.ones(4)
    counted(x)
    counted(y)
    del x
    counted(y)
    assert counted.calls == 2


def test_what_is_forgotten_is_made_anew(counted: Counted) -> None:
    x = torch.ones(3)
    counted(x)
    counted.memo.forget()
    counted(x)
    assert counted.calls == 2


def test_what_was_put_in_is_taken_out_once_and_only_for_its_tensor() -> None:
    memo: TensorMemo[str] = TensorMemo()
    x, y = torch.ones(3), torch.ones(3)
    memo.keep(x, "prepared")
    assert memo.take(y) is None
    assert [memo.take(x), memo.take(x)] == ["prepared", None]
    memo.keep(x, "stale")
    x.zero_()
    assert memo.take(x) is None


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda memo: pickle.loads(pickle.dumps(memo))])
def test_copies_are_empty_and_keep_the_rule(copied: Callable[[Any], Any]) -> None:
    memo: TensorMemo[Tensor] = TensorMemo(trust_uncounted=False)
    x = torch.ones(3)
    memo.keep(x, x.sum())
    other = copied(memo)
    assert other.take(x) is None
    assert other.trust_uncounted is False
    assert memo.take(x) is not None


def test_nothing_is_kept_while_a_graph_is_compiled() -> None:
    memo: TensorMemo[Tensor] = TensorMemo()

    def twice(x: Tensor) -> Tensor:
        return memo.get(x, lambda: x + 1) + memo.get(x, lambda: x * 2)  # with a memo, the second would be the first

    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, backend="eager")
    x = torch.ones(3)
    assert torch.equal(compiled(x), torch.full((3,), 4.0))
    assert memo.take(x) is None
    assert torch.equal(twice(x), torch.full((3,), 4.0)), "uncompiled, both are what was made first"
    torch._dynamo.reset()
