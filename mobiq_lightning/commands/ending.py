"""What the user of ``fit`` is told at its end: what was made, where, how large, how long it took, and what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from mobiq_lightning.checkpoint import Summary, summarize_checkpoint
from mobiq_lightning.commands.summary import size_of
from mobiq_lightning.console import program, say
from mobiq_lightning.runs import RESULTS_PLOT, RESULTS_TABLE, RunFolder

_BITS = 3.2
"""Bits of the command that is shown, where the checkpoint has them: between two depths, as only such a checkpoint can."""
_PROMPTS = {"builtin": "Return a string"}
"""Prompts that a model continues as it was trained to, where that is known."""
_PROMPT = "Once upon a time"


def say_what_was_made(run: RunFolder, seconds: float) -> None:
    """Says on standard error what a run folder holds at the end of ``fit``.

    Args:
        run: The run folder, finished.
        seconds: Seconds that the command took.
    """
    for line in _lines(run, summarize_checkpoint(run.path), seconds):
        say(line)


def _lines(run: RunFolder, summary: Summary, seconds: float) -> Iterator[str]:
    source = summary.provenance.get("source", {})
    size = f"{size_of(summary.n_bytes)} of tensors"
    if n_bytes := source.get("bytes"):
        size += f", {summary.n_bytes / n_bytes:.0%} of the source's {size_of(n_bytes)}"
    name = source.get("name", summary.architecture)
    lowest, highest = summary.depths[0], summary.depths[-1]
    made = f"{run.checkpoint}: {name} at any average from {lowest} to {highest} bits, {size}"
    if run.found == "finished":
        yield f"{made}."
    else:
        part = ", what was left of the run" if run.found == "begun" else ""
        yield f"Made {made}, in {_duration(seconds)}{part}."
    yield f"Its figures are in {run.path / RESULTS_TABLE} and {run.path / RESULTS_PLOT}. Next:"
    folder = shlex.quote(str(run.path))
    trust = "" if summary.knows_router else f" --trust-router {summary.config.router['class_path']}"
    bits, prompt = min(max(_BITS, lowest), highest), _PROMPTS.get(name, _PROMPT)
    yield f"  {program()} generate {folder} --bits {bits:g} --prompt {shlex.quote(prompt)}{trust}"
    yield f"  {program()} inspect {folder} --all"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h" if hours else "", f"{minutes} min" if hours or minutes else "", f"{rest} s"]
    return " ".join(part for part in parts if part)
