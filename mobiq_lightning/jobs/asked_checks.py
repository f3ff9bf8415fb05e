"""Checks of the values that a command line asks for together: files, bits, classes. Nothing heavy is imported for them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mobiq_lightning.errors import MobiqError, shown
from mobiq_lightning.jobs.known_names import STRATEGY_KEYS, strategy_classes
from mobiq_lightning.jobs.trainer_values import trainer_problems
from mobiq_lightning.jobs.value_ranges import range_problems
from mobiq_lightning.jobs.value_types import argument_problems, type_problems

_OURS = "mobiq_lightning."
_DEFAULT_SLICES = (2, 1, 1, 2, 2)
"""Slices of the shipped schemes where a recipe names none; `strategies.base.DEFAULT_SLICE_BITS`, which imports torch."""
_MOST_BITS = 8
_BUDGET_BITS = ("bits", "start_bits", "end_bits", "low_bits", "high_bits")


FILES = ("model.pretrained", "data.source", "data.eval_source")
"""Keys that name what a `fit` reads."""


def asked_problems(asked: Mapping[str, Any], files: Sequence[str] = ()) -> list[str]:
    """A line for every value that cannot be used.

    Args:
        asked: Values by dotted key, as `asked_values` gives them.
        files: Those of `FILES` that must name what is there, as modules of classes then must be; empty to look at values alone.
    """
    found = [problem for key, value in asked.items() for problem in type_problems(key, value)]
    found += [problem for key, value in asked.items() for problem in _argument(asked, key, value)]
    found += [problem for key, value in asked.items() if ".init_args." in key for problem in range_problems(key, value)]
    trainer = {key.removeprefix("trainer."): value for key, value in asked.items() if key.count(".") == 1}
    found += trainer_problems({key: value for key, value in trainer.items() if f"trainer.{key}" in asked})
    found += _bits(asked)
    found += _classes(asked, importable=bool(files))
    found += _files(asked, files)
    return list(dict.fromkeys(found))


def _argument(asked: Mapping[str, Any], key: str, value: Any) -> list[str]:
    """A line if a value is not of the type of an argument of a shipped strategy."""
    strategy, inner, argument = key.partition(".init_args.")
    kind = STRATEGY_KEYS.get(strategy)
    if kind is None or not inner or "." in argument:
        return []
    name = str(asked.get(f"{strategy}.class_path") or "").removeprefix(f"{_OURS}strategies.")
    return argument_problems(key, kind, name.rpartition(".")[2], argument, value)


def _files(asked: Mapping[str, Any], files: Sequence[str]) -> Iterator[str]:
    """Text and models that are not there."""
    from mobiq_lightning.sources import check_gguf, check_local_model, check_source, is_gguf

    for key in files:
        value = asked.get(key)
        try:
            if isinstance(value, str) and value:
                if key == "model.pretrained":
                    check_gguf(value) if is_gguf(value) else check_local_model(value)
                else:
                    check_source(value, key)
        except MobiqError as error:
            yield str(error)


def _bits(asked: Mapping[str, Any]) -> Iterator[str]:
    """Budgets and depths that the slices do not give."""
    given = asked.get("model.slices.init_args.slice_bits")
    name = str(asked.get("model.slices.class_path") or "").removeprefix(f"{_OURS}strategies.")
    if given is None and name not in strategy_classes("slices"):
        return
    slices = _DEFAULT_SLICES if given is None else given
    if not isinstance(slices, (list, tuple)) or not slices or any(type(b) is not int or b < 1 for b in slices):
        yield f"model.slices: slice_bits ({shown(slices)}) must be positive integers, coarsest slice first"
        return
    if sum(slices) > _MOST_BITS:
        yield f"model.slices: slice_bits ({shown(slices)}) add up to {sum(slices)}; at most {_MOST_BITS} bits are stored"
        return
    depths = [sum(slices[: k + 1]) for k in range(len(slices))]
    lowest, highest = depths[0], depths[-1]
    given_bits = asked.get("model.eval_bits")
    numbers = [n for n in given_bits if _is_number(n)] if isinstance(given_bits, list) else []
    if outside := [n for n in numbers if not lowest <= n <= highest]:
        yield f"model.eval_bits: {outside} lie outside of what the slices give, {lowest} to {highest}"
    for argument in _BUDGET_BITS:
        value = asked.get(f"model.budget.init_args.{argument}")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not lowest <= value <= highest:
            yield f"model.budget: {argument} ({value:g}): the slices {list(slices)} give {lowest} to {highest} bits"
    stages = asked.get("model.stages")
    for number, stage in enumerate(stages if isinstance(stages, list) else ()):
        depth = stage.get("depth") if isinstance(stage, dict) else None
        if type(depth) is int and depth not in depths:
            yield f"model.stages[{number}]: depth {depth} is no prefix of the slices; depths are {depths}"


def _classes(asked: Mapping[str, Any], importable: bool) -> Iterator[str]:
    """Strategies named by a dotted path that leads nowhere, or into Python's own library."""
    for key, path in asked.items():
        where = key.removesuffix(".class_path")
        if where not in STRATEGY_KEYS or where == key or not isinstance(path, str):  # m.gguf names no class
            continue
        top, dot, _ = path.partition(".")
        if not dot or path.startswith(_OURS) or path.endswith((".yaml", ".yml", ".json")):
            continue
        if top in sys.stdlib_module_names:
            kind = where.rpartition(".")[2]
            yield f"{where}: {path} is of Python's own library and makes no {kind}; give a class that does"
        elif importable and top.isidentifier() and importlib.util.find_spec(top) is None:
            yield (
                f"{where}: no module {top!r} is on the Python path. Run `python -m mobiq_lightning` from the folder of its file, "
                "or put that folder into PYTHONPATH"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
