"""Mutants are what they should be: other than the original, the same for a seed, and of many kinds."""

from __future__ import annotations

import copy
import json
from random import Random

import pytest
import yaml

from mobiq_lightning.errors import MobiqError, ResultsError
from tests.fuzzing import ACCEPTED, CLEAN, as_json, as_yaml, failures, mutants, mutate, outcome

VALUE = {"a": [1, 2.5, "x"], "b": {"c": None, "d": True}}


def test_a_seed_gives_the_same_mutants_and_leaves_the_content_as_it_is() -> None:
    before = copy.deepcopy(VALUE)
    first, again = ([as_json(mutate(VALUE, Random(seed))) for seed in range(50)] for _ in range(2))
    assert first == again
    assert before == VALUE
    assert len(set(first)) > 30


def test_most_mutants_of_bytes_differ_from_them() -> None:
    content = as_json(VALUE).encode()
    found = {mutate(content, Random(seed)) for seed in range(200)}
    assert len(found) > 100
    assert b"" in found or any(len(m) < len(content) for m in found)


@pytest.mark.parametrize(("parse", "write"), [(json.loads, as_json), (yaml.safe_load, as_yaml)])
def test_files_are_mutated_in_structure_and_in_bytes(parse, write) -> None:  # type: ignore[no-untyped-def]
    content = write(VALUE).encode()
    found = list(mutants(content, Random(0), 200, parse, write))
    structured = 0
    for mutant in found:
        try:
            structured += parse(mutant.decode()) != VALUE
        except (ValueError, RecursionError, yaml.YAMLError):
            continue
    assert len(found) == 200
    assert 60 < structured < 190


def test_an_error_of_the_package_is_clean_and_any_other_is_told_with_its_place() -> None:
    def read(content: bytes) -> None:
        if content == b"damaged":
            raise ResultsError("damaged")
        if content == b"wrong":
            raise KeyError("x")

    assert issubclass(ResultsError, MobiqError)
    assert outcome(lambda: read(b"damaged")) == CLEAN
    assert outcome(lambda: read(b"fine")) == ACCEPTED
    found = failures(read, iter([b"fine", b"damaged", b"wrong"]))
    assert list(found.values()) == [b"wrong"]
    assert next(iter(found)).startswith("KeyError at test_fuzzing.py:")
