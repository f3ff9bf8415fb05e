"""The report of a comparison: what it says, and what a browser makes of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mobiq_lightning.comparison.report import ReportCell, ReportInput, lines_of, write_report
from mobiq_lightning.comparison.report.runs import Run, against, read_strategies
from mobiq_lightning.comparison.report.style import Panel, as_svg
from mobiq_lightning.comparison.report.tables import measured_points
from mobiq_lightning.comparison.table import INTERPOLATION, CellRow, long_table, points_of
from mobiq_lightning.runs import Allocation, Measured, Row, read_results

FinishedRun = tuple[Path, list[str]]
SECTIONS = [
    "verdicts", "pareto-perplexity", "pareto-kl", "table", "failures", "layer-bits", "depth-shares", "depth-histograms",
    "token-position", "token-frequency", "block-error", "calibration-loss", "calibration-budget", "runs", "protocol", "reading",
]  # fmt: skip
# The two charts of quality: all allocations, routers against their mean, and routers against each of four controls.
PANELS = {
    "pareto-perplexity": 6, "pareto-kl": 6, "layer-bits": 2, "depth-shares": 2, "depth-histograms": 2, "token-position": 1,
    "token-frequency": 1, "block-error": 3, "calibration-loss": 1, "calibration-budget": 2,
}  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
PROBE = """<script>
const box = e => e.getBoundingClientRect();
document.body.dataset.probe = JSON.stringify({
  sections: [...document.querySelectorAll("section")].filter(s => box(s).height > 30).map(s => s.id),
  panels: [...document.querySelectorAll(".panel svg")].map(s => [Math.round(box(s).width), Math.round(box(s).height)]),
  counts: Object.fromEntries([...document.querySelectorAll("section")].map(s => [s.id, s.querySelectorAll(".panel svg").length])),
  broken: [...document.images].filter(i => !i.naturalWidth).length,
  heats: document.querySelectorAll("svg image").length,
  fetched: performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith("data:")),
  width: [innerWidth, document.documentElement.scrollWidth],
  ink: getComputedStyle(document.querySelector(".panel svg text")).fill,
});
</script>"""


def measured_of(folder: Path) -> Measured:
    measured = read_results(folder / "results.json").measured
    assert measured is not None
    return measured


@pytest.fixture(scope="module")
def comparison(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> ReportInput:
    """Two strategies from one real run, one of them with figures a little higher; a failed run, and one without diagnostics."""
    root = tmp_path_factory.mktemp("comparison")
    cells, rows = [], []
    for strategy, seed, factor in (("plain", 0, 1.0), ("plain", 1, 1.02), ("other", 0, 1.01), ("other", 1, 1.03)):
        folder = root / f"{strategy}-{seed}"
        folder.mkdir()
        for name in ("diagnostics.json", "metrics.jsonl"):
            shutil.copy(finished[0] / name, folder / name)
        results = json.loads((finished[0] / "results.json").read_text())
        for row in results["rows"]:
            row["perplexity"] *= factor if row["allocation"] not in ("full", "rtn") else 1.0
        (folder / "results.json").write_text(json.dumps(results))
        cells.append(ReportCell(strategy, seed, folder, {"model.epochs_per_block": seed}, "finished", 75.0, 0.5))
        rows += [CellRow(strategy, seed, row) for row in measured_of(folder).rows]
    (root / "other-1" / "diagnostics.json").unlink()
    cells.append(ReportCell("broken", 0, root / "broken-0", {}, "failed", reason="block 1: loss <nan> & no more"))
    measured = measured_of(finished[0])
    return ReportInput(
        "Two <strategies>",
        "python -m mobiq_lightning compare --config two.yaml",
        ["plain: routing is ahead of nothing."],
        measured.model,
        measured.protocol,
        measured.environment,
        cells,
        long_table(points_of(rows, [2, 2.5])),
        INTERPOLATION,
    )


@pytest.fixture(scope="module")
def page(comparison: ReportInput, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report"), comparison)


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """Runs headless Chromium on a page and returns what it prints."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on the PATH; on Debian: apt-get install chromium")

    def run(page: Path, *arguments: str) -> str:
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [browser, *FLAGS, profile, *arguments, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout

    return run


def test_the_page_needs_nothing_but_itself(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    assert len(html) < 3_000_000
    assert "<script" not in html
    references = re.findall(r"""(?:\b(?:src|href)\s*=\s*["']?|url\(\s*["']?|@import\s*["']?)([^"'\s>)]*)""", html)
    assert [r for r in references if not r.startswith(("#", "data:"))] == []


def test_a_browser_shows_every_section_and_no_broken_image(
    page: Path, browse: Callable[..., str], tmp_path: Path
) -> None:
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    inks = set()
    for width, scheme in ((1280, 1), (390, 0)):  # 0 is dark
        dom = browse(
            probed, "--dump-dom", f"--window-size={width},900", f"--blink-settings=preferredColorScheme={scheme}"
        )
        encoded = re.search(r'data-probe="([^"]*)"', dom)
        assert encoded is not None
        found = json.loads(encoded.group(1).replace("&quot;", '"'))
        assert found["sections"] == SECTIONS
        assert {section: count for section, count in found["counts"].items() if count} == PANELS
        assert all(w > 250 and h > 100 for w, h in found["panels"])
        assert found["broken"] == 0
        assert found["heats"] >= 2
        assert found["fetched"] == []
        assert found["width"][1] <= found["width"][0], "the page is wider than the window"
        inks.add(found["ink"])
    assert len(inks) == 2, "text in charts follows the scheme"


def test_screenshots_in_light_and_dark_are_not_blank(page: Path, browse: Callable[..., str], tmp_path: Path) -> None:
    from matplotlib.image import imread

    means = []
    for scheme in (1, 0):
        shot = tmp_path / f"shot-{scheme}.png"
        browse(
            page, f"--screenshot={shot}", "--window-size=1280,2400", f"--blink-settings=preferredColorScheme={scheme}"
        )
        assert shot.read_bytes().startswith(b"\x89PNG")
        pixels = imread(shot)[..., :3]
        assert pixels.shape[:2] == (2400, 1280)
        assert all(part.std() > 0.05 for part in (pixels[:400], pixels[800:1600], pixels[1600:]))
        means.append(float(pixels.mean()))
    assert means[0] > 0.85
    assert means[1] < 0.25


def test_charts_lie_beside_the_page_as_images(page: Path) -> None:
    expected = [s for s in SECTIONS if s not in ("verdicts", "table", "failures", "runs", "protocol", "reading")]
    assert sorted(path.stem for path in page.parent.glob("*.png")) == sorted(expected)
    assert all(path.stat().st_size > 10_000 for path in page.parent.glob("*.png"))


def test_failures_and_gaps_are_named_and_text_is_escaped(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    assert "<h1>Two &lt;strategies&gt;</h1>" in html
    assert "block 1: loss &lt;nan&gt; &amp; no more" in html
    assert "1 of 5 runs failed" in html
    assert "other, seed 1: bits per input" in html
    assert "are without this run: diagnostics.json is missing." in html
    assert html.index("plain: routing is ahead of nothing.") < html.index("<h2>")


def test_the_table_shows_shared_lines_once_and_marks_the_best(comparison: ReportInput) -> None:
    shared, plain, other = lines_of(comparison.table, "perplexity")
    assert [(line.strategy, line.allocation) for line in shared] == [("", "full precision"), ("", "round to nearest")]
    assert [line.allocation for line in plain] == [
        "router",
        "static layers",
        "best layers",
        "shuffled tokens",
        "random tokens",
    ]
    assert all(line.strategy == "other" for line in other)
    assert shared[1].values[1] is None  # no rounding to 2.5 bits
    full = shared[0].values
    assert full[0] is not None
    assert full[0] == full[1]
    assert not full[0].best
    best = {(line.strategy, line.values[1].text) for line in plain + other if line.values[1] and line.values[1].best}
    lowest = min(r.perplexity_mean for r in comparison.table if r.used_bits == 2.5)
    assert best == {("plain", f"{lowest:.2f}")}
    first = plain[0].values[0]
    assert first is not None
    assert first.spread.startswith("± ")


def test_measured_points_have_used_and_all_in_bits_over_runs_and_draws(comparison: ReportInput) -> None:
    strategies, _ = read_strategies(comparison.cells)
    point = next(p for p in measured_points(strategies) if p["allocation"] == "router" and p["target"] == "2.5")
    rows = [r for r in measured_of(comparison.cells[0].folder).rows if (r.allocation, r.target_bits) == ("router", 2.5)]
    assert point["n"] == 2
    assert point["used_bits"] == f"{rows[0].used_bits:.3f}"
    assert float(point["all_in_bits"]) > float(point["used_bits"])
    assert point["perplexity"].text == f"{rows[0].perplexity * 1.01:.2f}"


def test_routers_are_compared_with_the_mean_control_of_their_own_run() -> None:
    def row(allocation: Allocation, perplexity: float) -> Row:
        return Row(allocation, 3.0, 2.9, 3.4, perplexity, kl=0.1, seed=0)

    runs = [
        Run(0, [row("router", 9.0), row("random", 9.0), row("random", 11.0)]),
        Run(1, [row("router", 22.0), row("random", 20.0)]),
    ]
    (point,) = against(runs, "random", "perplexity")
    assert (point.x, point.mean) == (2.9, pytest.approx(0.0))
    assert point.spread == pytest.approx(200**0.5)


def test_a_resumed_journal_counts_each_step_once(comparison: ReportInput, tmp_path: Path) -> None:
    source = comparison.cells[0].folder
    folder = shutil.copytree(source, tmp_path / "run")
    lines = (source / "metrics.jsonl").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if "block/loss_epoch" in line)
    again = json.dumps({**json.loads(lines[first]), "block/loss_epoch": 123.0})
    (folder / "metrics.jsonl").write_text("\n".join([*lines[: first + 1], again, *lines[first + 1 :]]) + "\n")
    cells = [ReportCell("a", seed, where, {}, "finished") for seed, where in enumerate((source, folder))]
    (strategy,), missing = read_strategies(cells)
    assert missing == []
    once, resumed = strategy.runs
    assert [e["step"] for e in resumed.epochs] == [e["step"] for e in once.epochs]
    assert resumed.epochs[0]["loss"] == 123.0


def test_files_that_cannot_be_read_are_gaps(comparison: ReportInput, tmp_path: Path) -> None:
    folder = shutil.copytree(comparison.cells[0].folder, tmp_path / "run")
    (folder / "diagnostics.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 1, "blo')
    (strategy,), missing = read_strategies([ReportCell("a", 3, folder, {}, "finished")])
    assert strategy.runs[0].diagnostics is None
    assert [m.partition("are without this run: ")[2].partition(" (")[0] for m in missing] == [
        "metrics.jsonl, line 1 is not valid JSON",
        "diagnostics.json: inputs is missing; a list is expected there. The file is damaged or from another version: restore "
        "it, or remove it and repeat the command that wrote it.",
    ]
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    _, missing = read_strategies([ReportCell("a", 3, folder, {}, "finished")])
    assert "metrics.jsonl is a named pipe, not a regular file" in missing[0]


def test_diagnostics_of_another_shape_are_left_out_and_the_others_drawn(
    comparison: ReportInput, tmp_path: Path
) -> None:
    folder = shutil.copytree(comparison.cells[0].folder, tmp_path / "run")
    diagnostics = json.loads((folder / "diagnostics.json").read_text())
    diagnostics["inputs"][0]["name"] = "another"
    (folder / "diagnostics.json").write_text(json.dumps(diagnostics))
    cells = [comparison.cells[0], replace(comparison.cells[1], folder=folder)]
    (strategy,), missing = read_strategies(cells)
    assert [run.diagnostics is None for run in strategy.runs] == [False, True]
    assert "diagnostics.json has other inputs, depths, budgets or blocks than the first run" in missing[0]


@pytest.fixture(scope="module")
def odd_page(comparison: ReportInput, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of runs whose routers have no finite perplexity or none at all, under a title that begins no formula."""
    root = tmp_path_factory.mktemp("odd")
    cells = list(comparison.cells)
    for index, value in enumerate((float("inf"), float("nan"), 0.0)):
        folder = shutil.copytree(cells[index].folder, root / str(index))
        results = json.loads((folder / "results.json").read_text())
        next(row for row in results["rows"] if row["allocation"] == "router")["perplexity"] = value
        (folder / "results.json").write_text(json.dumps(results))
        cells[index] = replace(cells[index], folder=folder, seed=7 + index)
    rows = [
        CellRow(cell.strategy, cell.seed, row)
        for cell in cells
        if cell.status == "finished"
        for row in measured_of(cell.folder).rows
    ]
    table = long_table(points_of(rows, [2, 2.5]))
    return write_report(root, replace(comparison, title=r"cost $\nothing{ $", cells=cells, table=table))


@pytest.mark.parametrize("run", ["plain, seed 7", "plain, seed 8", "other, seed 9"], ids=["inf", "nan", "zero"])
def test_a_perplexity_that_is_not_finite_is_in_the_tables_and_in_no_chart(odd_page: Path, run: str) -> None:
    html = odd_page.read_text(encoding="utf-8")
    assert f"{run}: perplexity or KL is not finite (router at 2 bits); charts leave it out." in html
    assert (odd_page.parent / "pareto-perplexity.png").is_file()
    assert "inf" in html


def test_text_with_dollar_signs_is_no_formula(odd_page: Path) -> None:
    assert r"cost $\nothing{ $" in odd_page.read_text(encoding="utf-8")
    assert (odd_page.parent / "pareto-perplexity.png").is_file()


def test_a_comparison_of_which_nothing_finished_still_has_a_report(comparison: ReportInput, tmp_path: Path) -> None:
    failed = [ReportCell("a", 0, tmp_path, {}, "failed", reason="out of memory")]
    report = ReportInput("None", "command", [], "m", comparison.protocol, {}, failed, [], INTERPOLATION)
    html = write_report(tmp_path, report).read_text(encoding="utf-8")
    assert "there is nothing to draw" in html
    assert "out of memory" in html
    assert list(tmp_path.glob("*.png")) == []


def test_charts_on_the_page_have_its_ink_and_their_own_identifiers() -> None:
    panel = Panel("a <line>", lambda axes: axes.plot([0, 1], [0, 1], clip_on=True))
    one, two = as_svg(panel, "one"), as_svg(panel, "two")
    assert one.startswith("<svg")
    assert "currentColor" in one
    assert "#24292f" not in one
    assert 'aria-label="a &lt;line&gt;"' in one
    identifiers = [set(re.findall(r' id="([^"]*)"', svg)) for svg in (one, two)]
    assert identifiers[0]
    assert not identifiers[0] & identifiers[1]
