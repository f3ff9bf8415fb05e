"""Parts of training checkpoints that do not change while other blocks are trained: written once, then named, and mapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mobiq_lightning.files import sha256, write_atomically
from mobiq_lightning.runs import part_name

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration

AT_REST, PARTS = "at_rest", "parts"
"""Keys of a checkpoint: what the calibration says does not change at present, and the files that hold it."""
MAPPED_FROM = 2**16
"""Bytes from which on a tensor at rest is mapped from its file."""
_State = tuple[tuple[str, int, int, tuple[int, ...]], ...]
_Replace = Callable[[dict[str, Any]], dict[str, Any]]


def at_rest(module: ElasticCalibration) -> dict[str, Any]:
    """What the current epoch does not change: by name, the beginning of its tensors' names, its numbers in the optimizer, and a
    function that replaces its tensors by those of a file.

    Schemes of blocks that are not in training, and their inputs, except in the last epoch: it ends with thresholds of all.
    """
    optimizers = module.trainer.optimizers
    learned: list[nn.Parameter] = (
        [p for group in optimizers[0].param_groups for p in group["params"]] if optimizers else []
    )
    numbers = {id(parameter): number for number, parameter in enumerate(learned)}
    training, last = module.blocks_in_training(), module.current_epoch >= module.schedule.n_epochs - 1
    found: dict[str, Any] = {}
    for index, block in enumerate(module.sliced.calibrated_blocks()):
        parts = {"schemes": block.schemes} | ({} if last else {"inputs": block.inputs})
        for name, part in parts.items() if block not in training else ():
            of_optimizer = [numbers[id(p)] for p in part.parameters() if id(p) in numbers]
            prefix = f"blocks.{index}.{name}."
            known = {number: optimizers[0].state.get(learned[number]) for number in of_optimizer}
            averages = {number: state for number, state in known.items() if state}
            replace = partial(map_tensors, part, prefix, averages)
            found[f"{index:06d}-{name}"] = {"prefix": prefix, "optimizer": of_optimizer, "replace": replace}
    return found


@torch.no_grad()
def map_tensors(
    module: nn.Module, prefix: str, averages: Mapping[int, dict[str, Any]], stored: dict[str, Any]
) -> dict[str, Any]:
    """Replaces large tensors on the host by the same ones of a file, which a system that needs room takes from memory.

    They are mapped for this process alone: where they are trained again later, what is written does not reach the file.

    Args:
        module: Holds the tensors.
        prefix: What its tensors' names in the file begin with.
        averages: What the optimizer keeps of them, by number.
        stored: What the file holds.

    Returns:
        What `stored` holds, as the module and the optimizer have it now.
    """
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    for name, tensor in stored["state_dict"].items():
        key = name.removeprefix(prefix)
        if key in parameters and _can_be_mapped(parameters[key], tensor):
            parameters[key].data = tensor
        elif key in buffers and _can_be_mapped(buffers[key], tensor):
            owner, _, attribute = key.rpartition(".")
            module.get_submodule(owner)._buffers[attribute] = tensor
    for number, live in averages.items():
        of_file = stored["optimizer"][number]
        live.update({k: t for k, t in of_file.items() if isinstance(t, Tensor) and _can_be_mapped(live[k], t)})
    return {
        "state_dict": dict(module.state_dict(prefix=prefix)),
        "optimizer": {number: averages.get(number, {}) for number in stored["optimizer"]},
    }


def _can_be_mapped(live: Tensor, stored: Tensor) -> bool:
    """Whether a tensor of a file may take the place of one that is in use: a large one, on the host."""
    return live.device.type == "cpu" and live.dtype == stored.dtype and stored.nbytes >= MAPPED_FROM


class CheckpointParts:
    """Knows which files hold what is at rest, so that it is written when that changes, and not in every epoch.

    A file is named after its bytes, and never changed. It is used again as long as its tensors are the same objects that nothing
    has written to since; after a resume, if it holds the values that they have.
    """

    def __init__(self) -> None:
        self._files: dict[str, tuple[str, _State | None]] = {}

    def take_out(self, checkpoint: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
        """Splits a checkpoint.

        Args:
            checkpoint: As the trainer made it; its tensors are not copied.
            folder: Where the files are.

        Returns:
            The checkpoint without what is at rest, and names of the files, written now or before, that hold that.

        Raises:
            OSError: If a file cannot be written.
        """
        rest: dict[str, Any] = {k: v for k, v in checkpoint.items() if k != AT_REST}
        described: dict[str, Any] = checkpoint.get(AT_REST, {})
        self._files = {name: known for name, known in self._files.items() if name in described}
        if not described:
            return rest, []
        rest["state_dict"] = dict(checkpoint["state_dict"])
        optimizers = [{**state, "state": dict(state["state"])} for state in checkpoint.get("optimizer_states", [])]
        rest["optimizer_states"] = optimizers
        for name, what in described.items():
            names = [key for key in rest["state_dict"] if key.startswith(what["prefix"])]
            learned = optimizers[0]["state"] if optimizers else {}
            part = {
                "state_dict": {key: rest["state_dict"].pop(key) for key in names},
                "optimizer": {number: learned.pop(number) for number in what["optimizer"] if number in learned},
            }
            self._files[name] = self._file_of(name, part, folder, what.get("replace"))
        files = [file for file, _ in self._files.values()]
        return {**rest, PARTS: files}, files

    def put_back(self, checkpoint: dict[str, Any], folder: Path, load: Any) -> dict[str, Any]:
        """Makes a checkpoint whole again.

        Args:
            checkpoint: What `take_out` left.
            folder: Where the files are.
            load: Reads a file, as tensors and plain values alone.

        Raises:
            ValueError: If it names files that no run writes.
        """
        self._files = {}
        for file in checkpoint.pop(PARTS, []):
            name = part_name(file)
            if name is None:
                raise ValueError(f"{file!r} is no part of a training checkpoint")
            part = load(folder / file)
            checkpoint["state_dict"].update(part["state_dict"])
            if part["optimizer"]:
                checkpoint["optimizer_states"][0]["state"].update(part["optimizer"])
            self._files[name] = (file, None)
        return checkpoint

    def _file_of(self, name: str, part: dict[str, Any], folder: Path, replace: _Replace | None) -> tuple[str, _State]:
        """The file that holds a part, written if there is none; and the state of its tensors, then those of the file."""
        state = tuple(_states(part, ""))
        file, known = self._files.get(name, ("", None))
        is_there = bool(file) and (folder / file).is_file()
        if is_there and known == state:
            return file, state
        if not (is_there and known is None and _holds(folder / file, part)):
            file = _write(name, part, folder)
        stored = None
        with suppress(OSError, RuntimeError):  # on a file system that maps no files tensors stay in memory
            stored = _mapped(folder / file)
        if replace is not None and stored is not None:
            state = tuple(_states(replace(stored), ""))
        return file, state


def _write(name: str, part: dict[str, Any], folder: Path) -> str:
    """Writes a part to a file that is named after its bytes."""
    return write_atomically(
        folder / f"block-{name}.part",
        lambda temporary: torch.save(part, temporary),
        lambda temporary: f"block-{name}-{sha256(temporary)}.part",
    ).name


def _states(value: Any, name: str) -> Iterator[tuple[str, int, int, tuple[int, ...]]]:
    """Of all tensors in nested dicts: name, address, how often they were written to, and shape.

    Of extra state, which modules make anew whenever they are asked for it, the few numbers that it holds.
    """
    if isinstance(value, Tensor) and name.endswith("_extra_state"):
        yield name, 0, 0, tuple(value.flatten().tolist())
    elif isinstance(value, Tensor):
        yield name, value.data_ptr(), value._version, tuple(value.shape)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _states(inner, f"{name}/{key}")


def _holds(path: Path, part: dict[str, Any]) -> bool:
    """Whether a file holds the values of a part."""
    try:
        return _equal(_mapped(path), part)
    except Exception:  # noqa: BLE001 - whatever is wrong with it: it is written again
        return False


def _mapped(path: Path) -> dict[str, Any]:
    """What a file holds, its tensors mapped: read when they are used."""
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other.detach().cpu())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(one == other)
