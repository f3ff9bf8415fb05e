"""Writes the report of a comparison: one HTML file that needs nothing else, and its charts as PNGs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobiq_lightning.comparison.file_names import REPORT
from mobiq_lightning.comparison.report.calibration import error_chart, progress_charts
from mobiq_lightning.comparison.report.input import ReportInput
from mobiq_lightning.comparison.report.pareto import pareto_chart
from mobiq_lightning.comparison.report.routing import routing_charts
from mobiq_lightning.comparison.report.runs import Strategy, read_strategies
from mobiq_lightning.comparison.report.style import Chart, as_svg, key_marks, write_png
from mobiq_lightning.comparison.report.tables import (
    columns_of,
    facts_of,
    lines_of,
    measured_points,
    run_rows,
    strategy_rows,
)
from mobiq_lightning.files import write_text
from mobiq_lightning.runs import Metric

_TEMPLATE = "report.html.jinja"
_METRICS: dict[Metric, str] = {"perplexity": "Perplexity", "kl": "KL to full precision, nats per token"}


def write_report(folder: Path, comparison: ReportInput) -> Path:
    """Writes the report of a comparison, ``report.html``, and a PNG for each of its charts.

    Cells that failed and files that are missing are named in the report; charts are drawn from what there is.

    Args:
        folder: Folder that the files are written to.
        comparison: All that the report says.

    Returns:
        The path of the page.
    """
    strategies, missing = read_strategies(comparison.cells)
    results, details = _charts(comparison, [s for s in strategies if s.runs])
    for chart in (*results, *details):
        write_png(chart, folder, comparison.title)
    page = _render(
        report=comparison,
        failures=[cell for cell in comparison.cells if cell.status != "finished"],
        missing=missing,
        seeds=sorted({cell.seed for cell in comparison.cells}),
        results=[_on_page(chart) for chart in results],
        details=[_on_page(chart) for chart in details],
        bits=columns_of(comparison.table),
        tables=[(heading, lines_of(comparison.table, metric)) for metric, heading in _METRICS.items()],
        points=measured_points(strategies),
        strategies=strategy_rows(comparison.cells, strategies),
        runs=run_rows(comparison.cells),
        facts=_facts(comparison),
        versions=list(facts_of(comparison.environment)),
    )
    path = folder / REPORT
    write_text(path, page)
    return path


def _facts(comparison: ReportInput) -> list[tuple[str, str]]:
    """Names and values of model and protocol, without the seed of the calibration windows, which is each run's own."""
    facts = [("model", comparison.model), *facts_of(comparison.protocol.to_json())]
    return [(name, value) for name, value in facts if name != "calibration seed"]


def _charts(comparison: ReportInput, strategies: Sequence[Strategy]) -> tuple[list[Chart], list[Chart]]:
    """The charts of the results, and those of routing and calibration."""
    results = [pareto_chart(comparison, strategies, metric) for metric in _METRICS]
    details = [*routing_charts(strategies), error_chart(strategies), *progress_charts(strategies)]
    return [chart for chart in results if chart is not None], [chart for chart in details if chart is not None]


def _on_page(chart: Chart) -> dict[str, Any]:
    from markupsafe import Markup

    panels = [(panel.title, Markup(as_svg(panel, f"{chart.slug}-{i}"))) for i, panel in enumerate(chart.panels)]
    return {
        "chart": chart,
        "panels": panels,
        "key": [(entry.label, Markup(mark)) for entry, mark in key_marks(chart.key)],
    }


def _render(**values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(**values)
