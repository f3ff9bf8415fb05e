"""The check of a recipe before any work: what it will take, and everything that keeps it from running, in one list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobiq_lightning.console import say
from mobiq_lightning.errors import MobiqError, RecipeError
from mobiq_lightning.extras import require
from mobiq_lightning.jobs.arguments import Recipe, command_line, with_recipe
from mobiq_lightning.jobs.asked import asked_values, first_words, without_effect
from mobiq_lightning.jobs.asked_checks import FILES
from mobiq_lightning.jobs.recipe import check_arguments

if TYPE_CHECKING:
    from mobiq_lightning.calibration.planning import RunPlan
    from mobiq_lightning.jobs.cli import ElasticCLI
    from mobiq_lightning.sources import ModelShape, TextSurvey

_ON_CPU = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto")


@dataclass
class CheckReport:
    """What was found out about a recipe.

    Args:
        recipe: What was checked, as it was given.
        run_folder: Where it would run; empty if that is not known.
        device: Type of the device that it would run on; empty if that is not known.
        problems: What keeps it from running, a line each.
        notes: What a user may want to know, a line each.
        shape: Its model, as far as that can be told without weights.
        text: Its sources of text.
        plan: What it takes; None if the model or the recipe is not good enough to tell.
    """

    recipe: str
    run_folder: str = ""
    device: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shape: ModelShape | None = None
    text: list[TextSurvey] = field(default_factory=list)
    plan: RunPlan | None = None

    @property
    def can_run(self) -> bool:
        """Whether nothing was found that keeps it from running."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The report as plain values: sizes in numbers and bytes, times in seconds."""
        plan, tokenizer = self.plan, None if self.shape is None else self.shape.tokenizer
        found: dict[str, Any] = {
            "recipe": self.recipe,
            "can_run": self.can_run,
            "problems": self.problems,
            "notes": self.notes,
            "run_folder": self.run_folder,
            "device": self.device,
            "tokenizer_size": None if tokenizer is None else len(tokenizer),
            "text": [asdict(source) for source in self.text],
        }
        if plan is None:
            return {**found, "model": None, "memory": [], "disk": None, "time": None}
        sizes = asdict(plan.sizes)
        sizes["shapes"] = [[out, into, count] for (out, into), count in plan.sizes.shapes.items()]
        host, device = plan.memory_free
        return {
            **found,
            "model": {**sizes, "sliced_share": plan.sizes.share},
            "memory": [asdict(phase) for phase in plan.memory],
            "memory_free": {"host": host, "device": device},
            "disk": {"needed": plan.disk, "free": plan.disk_free},
            "time": {
                "measured": not plan.unmeasured,
                "why_not": plan.unmeasured,
                "seconds": None if plan.unmeasured else plan.seconds,
                "phases": [asdict(phase) for phase in plan.phases],
            },
        }


def check(recipe: Recipe, **overrides: Any) -> CheckReport:
    """Finds out what a recipe takes and everything that keeps it from running. Nothing is written to its run folder.

    Args:
        recipe: Path of a recipe, name of a shipped one such as ``"tiny"``, or the content of one as a mapping.
        **overrides: Keys of the recipe with other values.

    Returns:
        What was found; `problems` is empty if the recipe can run.

    Raises:
        RecipeError: If there is no such recipe, or it is none.
    """
    return run_check(command_line(recipe, overrides))


def run_check(arguments: Sequence[str]) -> CheckReport:
    """Checks a command line of ``fit``.

    Args:
        arguments: What would follow ``fit``: the recipe, and keys that override it.

    Returns:
        What was found.

    Raises:
        RecipeError: If there is no such recipe, or it is none.
    """
    require("calibrate", "check")
    arguments = with_recipe(arguments)
    asked = asked_values(arguments)
    report = CheckReport(" ".join(arguments).removeprefix("--config "))
    report.notes += without_effect(asked)
    _collect(report, lambda: check_arguments(arguments, FILES))
    say(first_words("check", asked))
    from mobiq_lightning.jobs import cli  # noqa: F401 - before libraries are told to be quiet: importing undoes that
    from mobiq_lightning.jobs.quiet import quiet_libraries

    with quiet_libraries():
        job = None if report.problems else _built(report, arguments)
        _look_at_model(report, asked if job is None else {"model.pretrained": job.model.pretrained}, job)
        if job is not None:
            _look_at_folder(report, job)
            _look_at_text(report, job)
            _look_at_work(report, job)
    return report


def _collect(report: CheckReport, look: Any) -> None:
    """Takes what is wrong into the list instead of raising it, each line once."""
    try:
        look()
    except MobiqError as error:
        lines = str(error).split("\n") if isinstance(error, RecipeError) else [str(error)]
        report.problems += [line for line in lines if line not in report.problems]


def _built(report: CheckReport, arguments: Sequence[str]) -> ElasticCLI | None:
    """The job, built on the CPU if its device is not there, so that the rest can be looked at; None if it cannot be built."""
    from mobiq_lightning.jobs.cli import ElasticCLI

    made: list[ElasticCLI] = []
    _collect(report, lambda: made.append(ElasticCLI("build", arguments)))
    if not made and all(problem.startswith("trainer: ") for problem in report.problems):
        known = list(report.problems)
        _collect(report, lambda: made.append(ElasticCLI("build", [*arguments, *_ON_CPU])))
        report.problems = known if made else report.problems
    if not made:
        return None
    job = made[0]
    report.run_folder, report.device = str(job.run_folder.path), job.trainer.strategy.root_device.type
    return job


def _look_at_model(report: CheckReport, asked: dict[str, Any], job: ElasticCLI | None) -> None:
    from mobiq_lightning.sources import read_shape

    pretrained = asked.get("model.pretrained")
    if isinstance(pretrained, str) and pretrained:
        report.shape = read_shape(pretrained, "auto" if job is None else job.model.dtype_name)
        report.problems += [problem for problem in report.shape.problems if problem not in report.problems]
        report.notes += report.shape.notes


def _look_at_folder(report: CheckReport, job: ElasticCLI) -> None:
    folder, overwrite = job.run_folder, bool(job.overwrites)
    before = len(report.problems)
    _collect(report, lambda: folder.check_claim(job.recipe, overwrite))
    if len(report.problems) > before:
        return
    if folder.finished and not overwrite:
        report.notes.append(f"{folder.path} holds a finished run; `fit` shows it again")
    elif (done := len({block for block, _ in folder.blocks.found()})) and not overwrite:
        report.notes.append(f"{folder.blocks.folder} holds calibrated blocks, {done} of them; `fit` takes them over")
    elif folder.epochs_kept and not overwrite:
        report.notes.append(f"{folder.path} holds {folder.epochs_kept} finished epochs; `fit` goes on after them")


def _look_at_text(report: CheckReport, job: ElasticCLI) -> None:
    from mobiq_lightning.sources import survey

    shape = report.shape
    if shape is None or shape.tokenizer is None or shape.model is None:
        return
    rows = shape.model.get_input_embeddings().num_embeddings
    report.text, problems = survey(job.datamodule, shape.tokenizer, shape.tokenizer_hash, rows)
    report.problems += problems
    longest = getattr(shape.model.config, "max_position_embeddings", None)
    for key in ("seq_len", "eval_seq_len"):
        if longest and getattr(job.datamodule, key) > longest:
            report.notes.append(f"data.{key} ({getattr(job.datamodule, key)}) is more than the {longest} of the model")


def _look_at_work(report: CheckReport, job: ElasticCLI) -> None:
    from mobiq_lightning.calibration.planning import plan_run

    if report.shape is None or report.shape.model is None:
        return

    def look() -> None:
        assert report.shape is not None
        report.plan = plan_run(
            report.shape.model,
            job.model,
            job.datamodule,
            job.trainer.callbacks,  # type: ignore[attr-defined]
            Path(report.run_folder),
            job.trainer.strategy.root_device,
            job.trainer.world_size,
            always_measure=True,
        )

    _collect(report, look)
    if report.plan is None:
        return
    report.problems += report.plan.shortages(report.device)
    report.notes += report.plan.by_block(report.device)
    for name, (width, last) in report.plan.sizes.uneven.items():
        report.notes.append(
            f"{name}: {width} columns are no multiple of the groups of {report.plan.sizes.group_size}; the last group of each "
            f"row has {last}"
        )
