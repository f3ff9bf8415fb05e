"""``check``."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mobiq_lightning.commands.command import Parser
from mobiq_lightning.commands.recipe_command import RecipeCommand
from mobiq_lightning.errors import MobiqError

if TYPE_CHECKING:
    from mobiq_lightning.jobs import CheckReport


class Check(RecipeCommand):
    """Find out before any work what a recipe takes, and everything that keeps it from running.

    It takes what `fit` takes, writes nothing to the run folder, and ends with 0 if the recipe can run, else with 1. Minutes
    follow from one step of each kind, taken on a random model of the same shapes with one or two blocks.
    """

    name = "check"
    usage = "RECIPE [--json] [--KEY VALUE ...]"

    def add_options(self, parser: Parser) -> None:
        """Declares what is no part of a recipe."""
        parser.add_argument("--json", action="store_true", help="print JSON: bytes, seconds, problems")

    def run(self, given: Namespace) -> None:
        """Prints what was found.

        Raises:
            MobiqError: If the recipe cannot run.
        """
        from mobiq_lightning.jobs import run_check

        report = run_check(given.keys)
        if given.json:
            print(json.dumps(report.to_json(), indent=2))
        else:
            print_report(report)
        if not report.can_run:
            count = len(report.problems)
            raise MobiqError(f"this recipe cannot run: {count} problem{'' if count == 1 else 's'}, listed above")


def print_report(report: CheckReport) -> None:
    """Prints what was found out about a recipe."""
    from rich.table import Table

    from mobiq_lightning.console import table_console

    console = table_console()
    table = Table(title=report.recipe, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in (*_model_rows(report), *_text_rows(report), *_plan_rows(report)):
        table.add_row(*row)
    if table.row_count:
        console.print(table)
    for title, lines in (("notes", report.notes), ("problems", report.problems)):
        if lines:
            console.print(f"{title}:")
        for line in lines:
            console.print(f"- {line}", soft_wrap=True)
    if report.can_run:
        console.print("This recipe can run.")


def _model_rows(report: CheckReport) -> Iterator[tuple[str, str]]:
    if report.run_folder:
        yield "run folder", f"{report.run_folder}, on {report.device}"
    if report.plan is None:
        return
    from mobiq_lightning.packing import WHOLE_ROW

    sizes = report.plan.sizes
    shapes = ", ".join(f"{count} x ({out} x {into})" for (out, into), count in sizes.shapes.items())
    slices = "+".join(map(str, sizes.slice_bits))
    yield "model", f"{sizes.kind}, {sizes.n_blocks} blocks, {sizes.model_bytes / 1e6:,.1f} MB"
    yield "sliced linears", f"{sum(sizes.shapes.values())}: {shapes}"
    yield "sliced", f"{sizes.sliced / 1e6:,.2f} M weights, {sizes.share:.1%} of those in blocks, into {slices} bits"
    if sizes.left_out:
        yield "in full precision", f"of the weights in blocks: {sizes.left_out}"
    if sizes.group_size is not None:
        yield "groups", f"{sizes.group_size} columns" if sizes.group_size < WHOLE_ROW else "whole rows"


def _text_rows(report: CheckReport) -> Iterator[tuple[str, str]]:
    shape = report.shape
    if report.plan is not None and shape is not None and shape.tokenizer is not None and shape.model is not None:
        rows = shape.model.get_input_embeddings().num_embeddings
        highest = max((source.highest_id for source in report.text), default=-1)
        used = f"highest in the text {highest}, " if highest >= 0 else ""
        yield "token ids", f"{used}tokenizer {len(shape.tokenizer)}, embedding {rows}"
    for source in report.text:
        asked = "all" if source.asked is None else f"{source.asked:,}"
        windows = f"{source.windows:,} windows of {source.length}, asked for {asked}"
        yield source.key, f"{source.source}: {source.tokens:,} tokens, {windows}"


def _plan_rows(report: CheckReport) -> Iterator[tuple[str, str]]:
    from mobiq_lightning.environment import format_seconds

    plan = report.plan
    if plan is None:
        return
    for phase in plan.memory:
        device = f", {report.device} {phase.device / 1e9:.2f} GB" if phase.device else ""
        yield f"memory, {phase.name}", f"host {phase.host / 1e9:.2f} GB{device}"
    free = [(name, n) for name, n in zip(("host", report.device), plan.memory_free, strict=True) if n is not None]
    yield "memory, free", ", ".join(f"{name} {n / 1e9:.2f} GB" for name, n in free) or "unknown"
    yield "disk", f"{plan.disk / 1e9:.3f} GB, free {plan.disk_free / 1e9:.3f} GB"
    for part in () if plan.unmeasured else plan.phases:
        steps = f"{part.steps:,} x {part.seconds:.3g} s"
        yield f"time, {part.name}", f"{format_seconds(part.steps * part.seconds)}, {steps}"
    yield "time", plan.unmeasured or f"about {format_seconds(plan.seconds)}"
