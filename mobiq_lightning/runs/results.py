"""results.json: what a run has measured, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mobiq_lightning.files import write_json
from mobiq_lightning.runs.guard_events import GuardEvent
from mobiq_lightning.runs.layer_gains import GainsSummary
from mobiq_lightning.runs.record import Record, at_least, read_json
from mobiq_lightning.runs.rows import Row
from mobiq_lightning.runs.same_recipe import without_place
from mobiq_lightning.runs.speed import LatencyNote


@dataclass(frozen=True)
class CalibrationText(Record):
    """The text that a run was calibrated on.

    Args:
        data: Source of the text: a name, or the path of files.
        n_samples: Windows in all.
        n_generated: Windows that the model wrote itself; None in results from before it could.
        seq_len: Tokens per window.
        seed: Seed of the choice of windows.
    """

    data: str
    n_samples: int
    n_generated: int | None = field(default=None, kw_only=True)
    seq_len: int
    seed: int


@dataclass(frozen=True)
class EvalProtocol(Record):
    """How perplexity is measured, and on what.

    Args:
        eval_protocol: `packed` or `documents`, see `TextWindows`.
        window: Tokens per window at most.
        n_windows: Windows that were scored.
        bos: Whether every window begins with the token for the beginning of a text.
        tokenizer: Hash of the tokenizer.
        data: Source of the text: a name, or the path of files.
        data_hash: Hash of the tokens.
        n_tokens: Tokens that were predicted.
        calibration: The text that the run was calibrated on.
    """

    eval_protocol: str
    window: int = field(metadata=at_least(0))
    n_windows: int = field(metadata=at_least(0))
    bos: bool
    tokenizer: str
    data: str
    data_hash: str
    n_tokens: int = field(metadata=at_least(0))
    calibration: CalibrationText


@dataclass(frozen=True)
class SlicesNote(Record):
    """What results say of the slices.

    Args:
        slice_bits: Bits of each slice.
        overhead_bits: Bits per weight that scales and biases take.
        router_bits: Bits per weight that routers and their tables take.
        threshold_scope: Which table of thresholds the router used.
        sliced_share: Part of the weights in decoder blocks that is sliced; None in results of earlier versions.
    """

    slice_bits: tuple[int, ...] = field(metadata=at_least(1, 8))
    overhead_bits: float = field(metadata=at_least(0))
    router_bits: float = field(metadata=at_least(0))
    threshold_scope: str
    sliced_share: float | None = field(default=None, metadata=at_least(0, 1))


@dataclass(frozen=True)
class RouterNote(Record):
    """What results say of the routers.

    Args:
        kind: Name of their class.
        deployable: Whether they can serve; otherwise they are an upper bound for routers that see one input.
    """

    kind: str = field(metadata={"key": "class"})
    deployable: bool


@dataclass(frozen=True)
class Addition(Record):
    """A later comparison whose rows were put beside those of earlier ones.

    Args:
        environment: Versions and machine, see `environment`.
        budgets: Budgets whose rows it measured, but for those that were measured once more since.
    """

    environment: Mapping[str, str]
    budgets: tuple[float, ...]


@dataclass(frozen=True)
class Measured(Record):
    """What the comparison of a run has measured.

    Args:
        model: Name or path of the source model.
        protocol: How it was measured, and on what.
        environment: Versions and machine, see `environment`.
        slices: What the slices take; None in results from before they were noted.
        router: What the routers are; None in results from before they were noted.
        collapsed: Inputs whose router collapsed, with the share of their tokens that read the same depth.
        layer_gains: What slices gain, or in words why that is not known.
        guards: What guards of the calibration have noticed.
        checkpoint: Hash of what the checkpoint holds that was compared; None in results from before it was noted.
        dtype: The dtype of both models; None in results from before it was noted.
        additions: Later comparisons that measured some of the rows; None if all are of one.
        rows: A row for each allocation, budget and seed.
    """

    model: str
    protocol: EvalProtocol
    environment: Mapping[str, str]
    slices: SlicesNote | None = field(default=None, kw_only=True)
    router: RouterNote | None = field(default=None, kw_only=True)
    collapsed: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    layer_gains: GainsSummary | str = field(default="", kw_only=True)
    guards: tuple[GuardEvent, ...] = field(default=(), kw_only=True)
    checkpoint: str | None = field(default=None, kw_only=True)
    dtype: str | None = field(default=None, kw_only=True)
    additions: tuple[Addition, ...] | None = field(default=None, kw_only=True)
    rows: tuple[Row, ...]

    @property
    def deployable(self) -> bool:
        """Whether the routers can serve."""
        return self.router is None or self.router.deployable

    @property
    def heading(self) -> str:
        """Model, text and protocol in a line; of local files their name, as a path tells nobody anything."""
        model, data = without_place(self.model), without_place(self.protocol.data)
        return f"{model} on {data}, {self.protocol.eval_protocol}, window {self.protocol.window}"

    def without_places(self) -> Measured:
        """The same, whole paths of local files cut to their last part: for others to see."""
        calibration = replace(self.protocol.calibration, data=without_place(self.protocol.calibration.data))
        protocol = replace(self.protocol, data=without_place(self.protocol.data), calibration=calibration)
        return replace(self, model=without_place(self.model), protocol=protocol)


@dataclass(frozen=True)
class HarnessEntry(Record):
    """What one metric of one task of lm-evaluation-harness gave.

    Args:
        task: Name of the task.
        metric: Name of the metric.
        value: Its value.
        stderr: Standard error; None if the harness gives none.
        n_examples: Examples that count; None if the harness does not say.
        num_fewshot: Examples in the prompt; None if the harness does not say.
        limit: Examples at most, as asked for; None for all.
        lm_eval: Version of the harness.
        environment: Versions and machine, see `environment`.
        bits: Bits per weight that were asked for, or ``full`` for the source model.
        used_bits: Mean code bits per weight that tokens read; None in full precision, or if nothing was counted.
        all_in_bits: Used bits with scales, biases, routers and tables; None where `used_bits` is.
        filter: Name of what the harness made of the answers before it scored them, where a task has several.
        task_version: Version of the task; scores of two versions do not compare.
        higher_is_better: Whether larger values are better; None if the harness does not say.
        metadata: What else the task says of itself, such as the lengths that it was made for.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n_examples: int | None
    num_fewshot: int | None
    limit: int | None
    lm_eval: str
    environment: Mapping[str, str]
    bits: float | Literal["full"]
    used_bits: float | None
    all_in_bits: float | None
    filter: str | None = None
    task_version: str | None = None
    higher_is_better: bool | None = None
    metadata: Mapping[str, Any] | None = None

    @property
    def metric_text(self) -> str:
        """The metric as tables show it, with its filter."""
        return self.metric if self.filter is None else f"{self.metric} ({self.filter})"

    @property
    def bits_text(self) -> str:
        """The bits asked for as tables show them."""
        return self.bits if isinstance(self.bits, str) else f"{self.bits:g}"


@dataclass(frozen=True)
class Results(Record):
    """Content of results.json, of a run folder or of a checkpoint. In the file, `measured` lies flat beside the others.

    Args:
        measured: What the comparison has measured; None if none was run, as for a checkpoint that was made elsewhere.
        lm_eval: What tasks of lm-evaluation-harness gave, one entry per task, metric and budget; None if none was run.
        latency: How fast the model runs on the machine that compared it, as `time_linears` and `LatencyCheck` give it; None
            if that was not measured.
    """

    measured: Measured | None = field(default=None, metadata={"flat": True})
    lm_eval: tuple[HarnessEntry, ...] | None = None
    latency: Mapping[str, Any] | None = field(default=None, metadata={"holds": LatencyNote})


def read_results(path: Path) -> Results:
    """What a results.json holds; nothing if there is no such file.

    Raises:
        ResultsError: If it is damaged or from another version.
    """
    return Results.from_json(read_json(path), path) if path.is_file() else Results()


def add_to_results(path: Path, **parts: Any) -> Results:
    """Puts parts into a results.json, and leaves all else in it as it is, also what only a newer version knows.

    Args:
        path: The file; it need not exist.
        **parts: `lm_eval` or `latency` as JSON.

    Returns:
        What the file then holds.

    Raises:
        ResultsError: If it is damaged or from another version.
    """
    stored = {**(read_json(path) if path.is_file() else {}), **parts}
    results = Results.from_json(stored, path)
    write_json(path, stored)
    return results


def generated_of(calibration: Mapping[str, Any]) -> str:
    """How much of the calibration text the model wrote itself, as a clause for a sentence.

    Args:
        calibration: `calibration` of provenance.json; checkpoints from before models could write do not say.

    Returns:
        An empty text if it wrote none.
    """
    n_generated = calibration.get("n_generated", 0)
    return f" and {n_generated} windows that the model wrote" if n_generated else ""
