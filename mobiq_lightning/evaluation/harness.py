"""Runs tasks of lm-evaluation-harness on one loaded model at several budgets."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from mobiq_lightning.checkpoint import load, load_tokenizer, resolve, write_card
from mobiq_lightning.console import say
from mobiq_lightning.environment import environment
from mobiq_lightning.errors import BitsError, DataError, FileError, MissingExtraError, MobiqError, RecipeError, nearest
from mobiq_lightning.input_files import parse_yaml, read_text
from mobiq_lightning.runs import ELASTIC, RESULTS, HarnessEntry, add_to_results, read_results


def evaluate_checkpoint(
    run: str,
    tasks: Sequence[str],
    budgets: Sequence[float],
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: Path | None = None,
    source: str | None = None,
    max_bits: int | None = None,
) -> list[HarnessEntry]:
    """Runs tasks of lm-evaluation-harness at several budgets and appends the scores to results.json.

    They go into the results of the checkpoint and, if it lies in a run folder, of its run.

    Args:
        run: Run folder or elastic checkpoint.
        tasks: Names of tasks, or paths of task YAML files.
        budgets: Bits per weight.
        limit: Examples per task at most.
        num_fewshot: Examples in the prompt; by default what the task says.
        batch_size: Requests that go through the model at once.
        include_path: Folder with further task YAML files.
        source: Full-precision model that is evaluated too, for comparison.
        max_bits: Depth in bits up to which planes are loaded; by default all.

    Returns:
        One entry per task, metric and budget.

    Raises:
        MissingExtraError: If the harness is not installed.
        RecipeError: If a task is not known.
        DataError: If the text of a task cannot be loaded.
        BitsError: If a budget is out of range.
    """
    folder = resolve(run)
    names, manager = _known_tasks(tasks, include_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(folder, max_bits=max_bits, device=device)
    for bits in budgets:  # before hours are spent on the first
        model.set_bits(bits)
    runner = _Runner(names, manager, limit, num_fewshot, batch_size, folder)
    entries: list[HarnessEntry] = []
    for bits in budgets:
        say(f"{', '.join(names)} at {bits:g} bits")
        with model.bits(bits):
            raw = runner.run(model)
        found = list(runner.entries(raw, bits, *_used_bits(model, bits)))
        _append(folder, found)  # at once: nothing finished is lost
        entries += found
    if source is not None:
        from mobiq_lightning.sources import load_source

        say(f"{', '.join(names)} in full precision")
        full = load_source(source).model.to(device)
        found = list(runner.entries(runner.run(full), "full", None, None))
        _append(folder, found)
        entries += found
    return entries


class _Runner:
    """Runs the same tasks on a model."""

    def __init__(
        self,
        names: list[str],
        manager: Any,
        limit: int | None,
        num_fewshot: int | None,
        batch_size: int,
        folder: Path,
    ) -> None:
        self.names, self.manager, self.limit = names, manager, limit
        self.num_fewshot, self.batch_size = num_fewshot, batch_size
        self.tokenizer = load_tokenizer(folder)

    def run(self, model: Any) -> Any:
        """Runs the tasks on a model and returns what the harness gives.

        Raises:
            DataError: If the text of a task cannot be loaded.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _global_seeds_kept():
            wrapped = HFLM(
                pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch_size, trust_remote_code=False
            )
            try:
                results = simple_evaluate(
                    model=wrapped,
                    tasks=self.names,
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    task_manager=self.manager,
                    log_samples=False,
                )
            except MobiqError:
                raise
            except Exception as error:  # of whatever kind: tasks are programs of others
                said = " ".join(str(error).split())[:300]
                raise DataError(
                    f"evaluate: {', '.join(self.names)} cannot be run ({type(error).__name__}: {said}). "
                    "Tasks of the harness load their data from the Hugging Face hub; offline give a task YAML whose "
                    "dataset_path is json and whose data_files is a local file"
                ) from error
        assert results is not None
        return results

    def entries(
        self, results: Any, bits: float | Literal["full"], used_bits: float | None, all_in_bits: float | None
    ) -> Iterator[HarnessEntry]:
        """Yields an entry for each task and metric of what `run` returned.

        Args:
            results: Results that `run` returned.
            bits: Bits per weight that were asked for, or ``full``.
            used_bits: Mean code bits per weight that tokens read; None in full precision.
            all_in_bits: Used bits with all that is stored beside the codes; None in full precision.
        """
        for task, metrics in results["results"].items():
            version_of = results.get("versions", {}).get(task)
            better = results.get("higher_is_better", {}).get(task) or {}
            metadata = _plain(results.get("configs", {}).get(task, {}).get("metadata"))
            for key, value in metrics.items():
                metric, _, kind = key.partition(",")
                if not isinstance(value, (int, float)) or isinstance(value, bool) or metric.endswith("_stderr"):
                    continue
                if "," not in key:  # not a metric, but a property of the task such as sample_len
                    continue
                error = metrics.get(key.replace(metric, f"{metric}_stderr", 1))
                yield HarnessEntry(
                    task=task,
                    metric=metric,
                    value=float(value),
                    stderr=error if isinstance(error, float) else None,
                    n_examples=results["n-samples"][task]["effective"] if task in results["n-samples"] else None,
                    num_fewshot=results["n-shot"].get(task),
                    limit=self.limit,
                    lm_eval=version("lm_eval"),
                    environment=environment(),
                    bits=bits,
                    used_bits=used_bits,
                    all_in_bits=all_in_bits,
                    filter=None if kind in ("", "none") else kind,
                    task_version=None if version_of is None else str(version_of),
                    higher_is_better=better.get(metric) if isinstance(better.get(metric), bool) else None,
                    metadata=metadata or None,
                )


def _used_bits(model: Any, bits: float) -> tuple[float | None, float | None]:
    """Code bits and all-in bits that the tasks read; None, and a word to the user, if nothing was counted."""
    try:
        used = model.bits_used()
    except BitsError as error:
        say(
            f"The bits that the tasks read at {bits:g} bits are not known ({error}); their scores are stored without them."
        )
        return None, None
    return used.code_bits, used.all_in_bits


def _plain(metadata: Any) -> dict[str, Any]:
    """What a task says of itself beside its version, as far as it is plain values, which results.json can hold."""
    try:
        plain = json.loads(json.dumps(metadata))
    except (TypeError, ValueError):
        return {}
    return {key: value for key, value in plain.items() if key != "version"} if isinstance(plain, dict) else {}


def _known_tasks(tasks: Sequence[str], include_path: Path | None) -> tuple[list[str], Any]:
    """Names of the tasks and the harness's index that knows them.

    Raises:
        MissingExtraError: If the harness is not installed.
        RecipeError: If it does not know a task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError(
            'evaluate needs lm-evaluation-harness: pip install "mobiq-lightning[evaluate]" (or lm-eval[hf])'
        ) from error
    for name in ("lm_eval", "lm-eval", "evaluate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    names: list[str] = []
    folders = [include_path] if include_path else []
    for task in tasks:
        path = Path(task)
        if path.suffix in (".yaml", ".yml"):
            if not path.exists():
                raise RecipeError(f"evaluate: there is no task file {path}")
            names.append(_task_in(path))
            folders.append(path.parent)
        else:
            names.append(task)
    # Reading the thousands of tasks that the harness ships takes 15 seconds; not if all that is asked for is here.
    manager = TaskManager(include_path=folders, include_defaults=False) if folders else None
    if manager is None or any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=folders or None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise RecipeError(f"evaluate: no task {unknown[0]!r}. {nearest(unknown[0], manager.all_tasks)}")
    return names, manager


def _task_in(path: Path) -> str:
    """Name of the task that a file describes.

    Raises:
        RecipeError: If the file is damaged, or describes none.
    """
    try:
        found = parse_yaml(read_text(path), str(path), _TaskLoader)
    except FileError as error:
        raise RecipeError(f"evaluate: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("task"), str):
        raise RecipeError(f"evaluate: {path} describes no task; its key `task` is to name one")
    return str(found["task"])


class _TaskLoader(yaml.SafeLoader):
    """Reads task files; the harness's own tags, such as ``!function``, are left alone."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _append(folder: Path, entries: Sequence[HarnessEntry]) -> None:
    """Appends entries to results.json of the checkpoint, and of the run that it lies in."""
    _append_to(folder / RESULTS, entries)
    of_run = folder.parent / RESULTS
    if folder.name == ELASTIC and of_run.is_file():  # not whatever lies beside an exported copy
        _append_to(of_run, entries)
    write_card(folder)  # last, since it can be made again


def _append_to(path: Path, entries: Sequence[HarnessEntry]) -> None:
    known = read_results(path).lm_eval or ()
    add_to_results(path, lm_eval=[entry.to_json() for entry in (*known, *entries)])


@contextmanager
def _global_seeds_kept() -> Iterator[None]:
    """Restores the state of the global random generators at the end, since the harness seeds them all."""
    import numpy as np

    before, numpy_before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)
