"""Checks a checkpoint through and through, and names what is damaged."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mobiq_lightning.checkpoint.check import differing_tensors, read_header
from mobiq_lightning.checkpoint.format import ElasticFormat
from mobiq_lightning.errors import CheckpointError, MobiqError
from mobiq_lightning.files import sha256
from mobiq_lightning.packing import BUDGETS, carrier_of, input_tensor_name, kind_of, plane_name
from mobiq_lightning.runs import CONFIG, HASHES, INDEX

PROBE_TOKENS = 16
"""Number of tokens that go through the model in the forward passes of the check."""

Report = Callable[[str, list[str]], None]


def verify(folder: str | Path, report: Report | None = None) -> list[str]:
    """Checks a checkpoint: files, hashes, scales, padding of codes, thresholds, and a forward pass at every depth.

    Args:
        folder: A run folder, or an elastic checkpoint.
        report: Function called after every check with the name of the check and the problems found.

    Returns:
        Problems, one line each; empty if all is well.

    Raises:
        CheckpointError: If the folder is no elastic checkpoint at all.
    """
    from mobiq_lightning.checkpoint.loading import resolve

    path = resolve(folder)
    problems: list[str] = []
    steps: list[tuple[str, Callable[[Path], list[str]]]] = [
        ("files and hashes", _check_files),
        ("scales, codes and thresholds", _check_values),
        ("tensors fit the model, and a forward pass at every depth", _check_model),
    ]
    for name, check in steps:
        if problems and check is _check_model:
            break  # the model would not load, for the reasons already found
        found = check(path)
        problems += found
        if report is not None:
            report(name, found)
    return problems


def _check_files(folder: Path) -> list[str]:
    """Checks that all files are there and whole, and hold what was written."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        return [f"{INDEX} or {CONFIG} cannot be read: {type(error).__name__}: {error}"]
    problems: list[str] = []
    where: dict[str, Path] = {}
    unreadable: set[str] = set()
    for file in sorted(set(index.values())):
        try:
            where |= dict.fromkeys(read_header(folder / file), folder / file)
        except CheckpointError as error:
            problems.append(str(error))
            unreadable.add(file)
    problems += [f"{f}: {n} is missing" for n, f in index.items() if n not in where and f not in unreadable]
    if not (folder / HASHES).is_file():
        return [*problems, f"{HASHES} is missing, so bytes cannot be compared with what was written"]
    try:
        hashes = json.loads((folder / HASHES).read_text(encoding="utf-8"))
        files, tensors = dict(hashes["files"]), dict(hashes["tensors"])
    except (ValueError, KeyError, TypeError) as error:
        return [*problems, f"{HASHES} cannot be read: {type(error).__name__}: {error}"]
    for name, value in files.items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif sha256(folder / name) != value:
            problems.append(f"{name} is not what was written")
    known = {name: path for name, path in where.items() if name in tensors}
    problems += [
        f"{known[name].name}: the bytes of {name} are not those that were written"
        for name in differing_tensors(known, tensors)
    ]
    problems += [f"{where[n].name}: {n} has no hash in {HASHES}" for n in where if n not in tensors]
    return problems


def _check_values(folder: Path) -> list[str]:
    """Checks that all values are finite, that scales are above 0, and that thresholds fall as budgets rise."""
    problems: list[str] = []
    falls = _thresholds_fall(folder)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            read_header(path)
        except CheckpointError:
            continue  # said before
        with safe_open(path, framework="pt") as file:
            tensors = _Lazy(file)
            for name in tensors.names:
                problems += [f"{path.name}: {problem}" for problem in _problems_of_tensor(name, tensors, falls)]
    return problems


class _Lazy:
    """Reads tensors of an open file by name, each when it is asked for."""

    def __init__(self, file: Any) -> None:
        self.names = list(file.keys())
        self._file = file

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor


def _problems_of_tensor(name: str, tensors: _Lazy, falls: bool) -> Iterator[str]:
    kind = kind_of(name)
    if kind == "plane":
        return  # every byte is a valid code; the padding is checked with the model, which knows the sizes
    value = tensors[name]
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        yield f"{name}: {int((~torch.isfinite(value)).sum())} of {value.numel()} values are NaN or infinite"
    elif kind == "thresholds":
        if falls and not bool((value[:, 1:] <= value[:, :-1]).all()):
            row, column = (value[:, 1:] > value[:, :-1]).nonzero()[0].tolist()
            budgets = tensors[input_tensor_name(carrier_of(name), BUDGETS)]
            yield (
                f"{name}: thresholds must not rise with the budget; they do from {budgets[column]:g} to "
                f"{budgets[column + 1]:g} bits (slices held: {row + 1})"
            )
    elif (kind == "scale" or (kind == "transform" and name.endswith(".scale"))) and not bool((value > 0).all()):
        yield f"{name}: {int((value <= 0).sum())} of {value.numel()} scales are not above 0"


def _thresholds_fall(folder: Path) -> bool:
    """Whether the thresholds of a checkpoint must fall as budgets rise; with routers that allocate whole inputs, no."""
    from mobiq_lightning.checkpoint.quantizer import build_router

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        elastic = ElasticFormat.from_json(config["quantization_config"])
        return build_router(elastic.router, 8, len(elastic.slice_bits)).per_token
    except (MobiqError, OSError, ValueError, KeyError):
        return True  # what is wrong with config.json is said by another check


def _check_model(folder: Path) -> list[str]:
    """Checks that the model loads, and gives finite logits at every depth and between, using the bits asked for."""
    from mobiq_lightning.checkpoint.loading import load
    from mobiq_lightning.nn import ElasticLinear

    try:
        model = load(folder, check_hashes=False)
    except MobiqError as error:
        return [str(error)]
    problems: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, ElasticLinear) and module.in_features % 8:
            spare = (1 << (-module.in_features % 8)) - 1
            for number, plane in enumerate(module.packed.planes):
                if bool((plane[:, -1] & spare).any()):
                    problems.append(
                        f"{name}.{plane_name(number)}: bits beyond the last of {module.in_features} weights are set"
                    )
    ids = torch.arange(PROBE_TOKENS).remainder(model.config.vocab_size).unsqueeze(0)
    depths = [float(depth) for depth in model.dial.inputs[0].depths]
    for bits in sorted({*depths, *((a + b) / 2 for a, b in itertools.pairwise(depths))}):
        model.set_bits(bits)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        if not bool(torch.isfinite(logits).all()):
            problems.append(f"at {bits:g} bits the logits of a forward pass are not finite")
        used = model.bits_used().code_bits
        if bits in (depths[0], depths[-1]) and used != bits:
            problems.append(f"at {bits:g} bits the model used {used:g}")
    return problems


check_files = _check_files
