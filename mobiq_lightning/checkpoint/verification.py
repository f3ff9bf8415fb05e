"""Checks a checkpoint through and through, and names what is damaged."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from mobiq_lightning.checkpoint.check import differing_tensors
from mobiq_lightning.checkpoint.contents import read_contents
from mobiq_lightning.checkpoint.load_call import LoadCall, answering, current_call
from mobiq_lightning.checkpoint.named_classes import router_class
from mobiq_lightning.checkpoint.own_files import own_file
from mobiq_lightning.checkpoint.provenance import read_provenance
from mobiq_lightning.checkpoint.values import value_problems
from mobiq_lightning.errors import CheckpointError, MobiqError, UntrustedClassError
from mobiq_lightning.packing import plane_name
from mobiq_lightning.runs import HASHES, RESULTS, SPEED, SpeedNote, read_json, read_results

PROBE_TOKENS = 16
"""Number of tokens that go through the model in the forward passes of the check."""

Report = Callable[[str, list[str]], None]


def verify(folder: str | Path, report: Report | None = None, trust_router: str | None = None) -> list[str]:
    """Checks a checkpoint: files, hashes, scales, padding of codes, thresholds, and a forward pass at every depth.

    Args:
        folder: A run folder, or an elastic checkpoint.
        report: Function called after every check with the name of the check and the problems found.
        trust_router: Dotted path of the checkpoint's router if it is none of this package, and may be imported and run.

    Returns:
        Problems, one line each; empty if all is well.

    Raises:
        CheckpointError: If the folder is no elastic checkpoint at all.
        UntrustedClassError: If the model cannot be built without importing a router of somebody's own; what can be checked
            without it was checked and reported.
    """
    from mobiq_lightning.checkpoint.loading import resolve

    path = resolve(folder)
    problems: list[str] = []
    steps: list[tuple[str, Callable[[Path], list[str]]]] = [
        ("files and hashes", check_files),
        ("scales, codes and thresholds", _check_values),
        ("tensors fit the model, and a forward pass at every depth", _check_model),
    ]
    with answering(LoadCall(check_hashes=False, trust_router=trust_router or current_call().trust_router)):
        for name, check in steps:
            if problems and check is _check_model:
                break  # the model would not load, for the reasons already found
            try:
                found = check(path)
            except UntrustedClassError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a damaged file makes of a library is damage
                found = [f"this could not be checked: {type(error).__name__}: {error}"]
            problems += found
            if report is not None:
                report(name, found)
    return problems


def check_files(folder: Path) -> list[str]:
    """Checks that all files of a checkpoint are there and whole, and hold what was written.

    Args:
        folder: Folder of an elastic checkpoint.

    Returns:
        Problems, one line each; empty if all is well.
    """
    try:
        contents = read_contents(folder)
    except CheckpointError as error:
        return [str(error)]
    try:
        check_figures(folder)
    except MobiqError as error:
        contents.problems.append(str(error))
    hashes = contents.hashes
    if hashes is None:
        missing = f"{HASHES} is missing, so bytes cannot be compared with what was written"
        return contents.problems or [missing]
    known = {name: path for name, path in contents.where.items() if name in hashes.tensors}
    named = {path.name for path in contents.shards}
    extra = [p.name for p in sorted(folder.glob("*.safetensors")) if p.name not in named and not contents.problems]
    contents.problems += [f"{name} holds tensors and is not in the index" for name in extra]
    differing = [
        f"{known[name].name}: the bytes of {name} are not those that were written"
        for name in differing_tensors(known, hashes.tensors)
    ]
    return [*contents.problems, *differing]


def check_figures(folder: Path) -> None:
    """Checks the files of a checkpoint that say what was measured, which have no hash, and where it comes from.

    Raises:
        MobiqError: If one of them is damaged, or no file of the folder.
    """
    read_provenance(folder)
    for name in (RESULTS, SPEED):
        if (folder / name).exists():
            own_file(folder, name)
    read_results(folder / RESULTS)
    if (folder / SPEED).exists():
        SpeedNote.from_json(read_json(folder / SPEED), folder / SPEED)


def _check_values(folder: Path) -> list[str]:
    """Checks that all values are finite, that scales are above 0, and that thresholds fall as budgets rise."""
    try:
        contents = read_contents(folder, compare_files=False)
        falls = router_class(contents.elastic.router["class_path"]).per_token
    except CheckpointError:
        return []  # what is wrong is said by the other checks
    problems: list[str] = []
    for path in contents.shards:
        with safe_open(path, framework="pt") as file:
            problems += [
                f"{path.name}: {problem}"
                for name in file.keys()  # noqa: SIM118 - not a dict
                for problem in value_problems(name, file.get_tensor, falls)
            ]
    return problems


def _check_model(folder: Path) -> list[str]:
    """Checks that the model loads, and gives finite logits at every depth and between, using the bits asked for."""
    from mobiq_lightning.checkpoint.loading import load
    from mobiq_lightning.nn import ElasticLinear

    try:
        model = load(folder, check_hashes=False)
    except UntrustedClassError:
        raise
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
