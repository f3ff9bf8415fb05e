"""What README and docs say holds: links, files, commands, keys, names and figures. Their commands are run in `test_readme`."""

from __future__ import annotations

import contextlib
import inspect
import json
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.real_model.table import figures as smollm2_figures
from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.calibration.schedule import Stage
from mobiq_lightning.cli import main
from mobiq_lightning.jobs.arguments import with_recipe
from mobiq_lightning.jobs.known_names import strategy_classes
from mobiq_lightning.jobs.recipe import check_arguments
from mobiq_lightning.runs import LABELS, MeanRow, Row, summarize
from mobiq_lightning.sources import TextWindows
from tests.test_architecture import LAYERS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    *sorted((ROOT / "mobiq_lightning").rglob("*.md")),
]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(r"(?:python -m mobiq_lightning|mobiq-lightning) ([a-z].*)")
NAME = re.compile(r"\bmobiq_lightning(?:\.[A-Za-z]\w*)+")
SOURCES = ("mobiq_lightning", "benchmarks", "examples")
IN_REPOSITORY = re.compile(r"^(?:mobiq_lightning|recipes|docs|tests|examples|benchmarks|\.ci)/[\w./*-]+$")
of_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def lines_of(page: Path) -> Iterator[tuple[bool, str]]:
    """Lines of a page, each with whether it stands in a code block; the fences themselves are left out."""
    code = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            code = not code
        else:
            yield code, line


def prose_of(page: Path) -> str:
    return "\n".join(line for code, line in lines_of(page) if not code)


def code_of(page: Path) -> str:
    """Code blocks of a page, lines that end in a backslash joined with the next one."""
    return "\n".join(line for code, line in lines_of(page) if code).replace("\\\n", " ")


def inline_code_of(page: Path) -> list[str]:
    """What stands between backticks, also where the wrapping has put a line break into it."""
    joined = re.sub(r"\s*\n\s*(?![|#\s-])", " ", prose_of(page))
    return INLINE.findall(joined)


def anchors_of(page: Path) -> set[str]:
    """Headings of a page as GitHub makes anchors of them."""
    titles = [line.lstrip("#").strip() for code, line in lines_of(page) if not code and line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands_of(page: Path) -> list[list[str]]:
    """Command lines of this package in the code blocks and between backticks, each from the command on."""
    blocks = [found for line in code_of(page).splitlines() for found in COMMAND.findall(line.split("  #")[0])]
    inline = [found for text in inline_code_of(page) for found in COMMAND.findall(text)]
    return [shlex.split(found.replace("[--", "--").replace(" ...]", "").replace("]", "")) if "[--" in found
            else shlex.split(found) for found in (*blocks, *inline)]  # fmt: skip


@of_every_page
def test_every_relative_link_resolves(page: Path) -> None:
    for target in LINK.findall(prose_of(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors_of(file), f"{target}: no such heading"


@of_every_page
def test_every_file_that_is_named_is_there(page: Path) -> None:
    named = {text for text in inline_code_of(page) if IN_REPOSITORY.match(text)}
    assert [name for name in sorted(named) if not any(ROOT.glob(name.rstrip("/")))] == []


def can_be_imported(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@of_every_page
def test_every_python_name_that_is_named_can_be_imported(page: Path) -> None:
    assert [name for name in NAME.findall(page.read_text(encoding="utf-8")) if not can_be_imported(name)] == []


@of_every_page
def test_prose_is_wrapped_at_120_columns(page: Path) -> None:
    free = [line for code, line in lines_of(page) if not code and not line.startswith(("|", "!["))]
    assert [line for line in free if len(line) > 120] == []


def test_readme_and_contributing_stay_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 170
    assert len(CONTRIBUTING.read_text(encoding="utf-8").splitlines()) <= 95


def test_every_page_is_reached_from_the_readme() -> None:
    seen, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        targets = [t.partition("#")[0] for t in LINK.findall(prose_of(page)) if "://" not in t]
        waiting += [(page.parent / target).resolve() for target in targets if target]
    assert [page for page in PAGES if page.resolve() not in seen] == []


def test_contributing_lists_the_rooms_in_the_order_of_the_architecture() -> None:
    rows = re.findall(r"^\| (`[^|]+) \|", CONTRIBUTING.read_text(encoding="utf-8"), re.MULTILINE)
    listed = [room.removesuffix(".py") for row in rows for text in INLINE.findall(row) for room in text.split()]
    left_out = {"version", "__init__", "__main__"}
    level = {room: number for number, rooms in enumerate(LAYERS) for room in rooms.split() if room not in left_out}
    listed = [room for room in listed if room != "mobiq_lightning/"]  # the heading
    assert set(listed) == set(level)
    assert [level[room] for room in listed] == sorted(level.values())


def test_the_set_up_commands_are_those_of_the_check() -> None:
    check = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("torch==2.13.0", '-e ".[test]"'):
        assert f"pip install {command}" in README.read_text(encoding="utf-8")
        assert f"pip install --quiet {command}" in check


# ------------------------------------------------------------------ commands and keys


def recipe_arguments_of(command: str, rest: list[str]) -> list[str]:
    """What follows a command that takes a recipe, without options of its own; a run's recipe stands for the one it had."""
    own = {"outliers": {"--bits", "--share"}, "fit": {"--blocks"}}.get(command, set())
    given = [t for before, t in zip(["", *rest], rest, strict=False) if t not in own and before not in own]
    given = [
        str(ROOT / "recipes" / "tiny.yaml") if t.endswith("config.yaml") or t.startswith("runs/") else t for t in given
    ]
    return [str(ROOT / t) if t.startswith("recipes/") else t for t in given]


@of_every_page
def test_every_command_and_every_option_exists(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, *rest in commands_of(page):
        if command in ("fit", "validate", "outliers"):
            check_arguments(with_recipe(recipe_arguments_of(command, rest)))
            continue
        with contextlib.suppress(SystemExit):  # argparse ends so, whether there is such a command or not
            main([command, "--help"])
        printed = capsys.readouterr().out
        assert "usage:" in printed, f"no command {command}"
        known = {option.replace("-", "_") for option in re.findall(r"--([\w-]+)", printed)}
        used = [t.partition("=")[0][2:].replace("-", "_") for t in rest if t.startswith("--") and "." not in t]
        assert set(used) <= known, f"{command}: {used}"


@of_every_page
def test_every_option_that_is_named_by_itself_exists(page: Path) -> None:
    sources = [path.read_text(encoding="utf-8") for folder in SOURCES for path in (ROOT / folder).rglob("*.py")]
    for text in inline_code_of(page):
        if not text.startswith("--"):
            continue
        option = text.split()[0].partition("=")[0]
        if option.partition(".")[0] in ("--model", "--data", "--trainer"):
            base = [
                "--config",
                str(ROOT / "recipes" / "tiny-ranges.yaml"),
            ]  # whose classes have the arguments that are named
            given = [t for t in shlex.split(text) if t != "..."]
            check_arguments([*base, *given, *(["null"] if len(given) == 1 and "=" not in given[0] else [])])
        else:
            name = option[2:].replace("-", "_")
            known = re.compile(rf"--{re.escape(option[2:])}\b|\b{re.escape(name)}: |\"{re.escape(name)}\"")
            assert any(known.search(source) for source in sources), f"{option} is nowhere declared"


def keys_of(heading: str) -> set[str]:
    """First column of the table below a heading of the page of recipes, a key of a group by the group's name."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = text.split(f"\n### {heading}\n")[1].split("\n## ")[0].split("\n### ")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)
    return {key.partition(".")[0] for cell in cells for key in INLINE.findall(cell)}


@pytest.mark.parametrize(
    ("heading", "owner"), [("`model`", ElasticCalibration), ("`data`", TextWindows), ("Stages", Stage)]
)
def test_the_page_of_recipes_lists_every_key(heading: str, owner: type) -> None:
    assert keys_of(heading) == set(inspect.signature(owner).parameters)


def test_the_page_of_recipes_lists_every_strategy_with_its_arguments() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").split("### Strategies")[1].split("\n## ")[0]
    rows = [line.split("|") for line in page.splitlines() if line.startswith("|")]
    for kind in ("slices", "transforms", "routers", "budgets", "objectives"):
        for name, arguments in strategy_classes(kind).items():
            row = next((row for row in rows if f"`{name}`" in row[2]), None)
            assert row is not None, f"{name} is missing"
            of_base = INLINE.findall(rows[rows.index(row) - 1][3]) if "the same" in row[3] else []
            if "the same" in row[3] and "the same" in rows[rows.index(row) - 1][3]:
                of_base += INLINE.findall(rows[rows.index(row) - 2][3])
            assert set(arguments) <= {*INLINE.findall(row[3]), *of_base}, name


# ------------------------------------------------------------------ figures


def tables_of(page: Path) -> list[list[list[str]]]:
    """Tables of a page: rows of cells, without the line of dashes."""
    tables: list[list[list[str]]] = [[]]
    for line in prose_of(page).splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not set("".join(cells)) <= {"-"}:
                tables[-1].append(cells)
        elif tables[-1]:
            tables.append([])
    return tables


def table_with(page: Path, heading: str) -> list[list[str]]:
    return next(table for table in tables_of(page) if table and heading in table[0])


def committed_rows() -> list[MeanRow]:
    return summarize(Row(**row) for row in json.loads((RESULTS / "tiny.json").read_text())["rows"])


def test_the_rows_of_the_readme_are_those_of_the_committed_run() -> None:
    rows = committed_rows()
    measured = [
        [
            LABELS[row.allocation], f"{row.target_bits:g}", f"{row.used_bits:.2f}",
            f"{row.all_in_bits:.2f}", f"{row.perplexity:.2f}", f"{row.kl:.4f}",
        ]
        for row in rows
    ]  # fmt: skip
    shown = table_with(README, "KL (nats)")[1:]
    assert len(shown) == 8
    assert [row for row in shown if row not in measured] == []


def test_the_whole_table_of_the_built_in_model_is_that_of_the_committed_run() -> None:
    rows = committed_rows()
    page = (ROOT / "docs" / "results" / "built-in-model.md").read_text(encoding="utf-8")
    printed = [[cell.strip() for cell in line.strip("│").split("│")] for line in page.splitlines() if line[:1] == "│"]
    printed = [cells for cells in printed if len(cells) == 6]
    expected = [
        [
            LABELS[row.allocation], f"{row.target_bits:g}", f"{row.used_bits:.2f}", f"{row.all_in_bits:.2f}",
            f"{row.perplexity:.2f}" + (f" ± {row.spread:.2f}" if row.n_seeds > 1 else ""), f"{row.kl:.4f}",
        ]
        for row in rows
    ]  # fmt: skip
    assert [cells for cells in printed if cells[1] != "target bits"] == expected


def test_the_table_of_the_real_model_is_that_of_the_committed_run() -> None:
    rows = {(r["allocation"], r["target_bits"]): r for r in json.loads((RESULTS / "smollm2.json").read_text())["rows"]}
    shown = table_with(ROOT / "docs" / "results" / "smollm2.md", "perplexity / KL (nats)")
    budgets = [float(name.removesuffix(" bits")) for name in shown[0][1:]]
    allocations = {
        "round to nearest, own code": "rtn",
        "router": "router",
        "static layers": "static",
        "best layers": "layers",
        "shuffled tokens": "shuffled",
        "random tokens": "random",
    }
    assert [line[0] for line in shown[1:]] == list(allocations)
    for name, *cells in shown[1:]:
        measured = [rows.get((allocations[name], bits)) for bits in budgets]
        assert cells == [smollm2_figures(row["perplexity"], row["kl"]) if row else "" for row in measured], name


def test_every_file_of_results_has_its_command_in_the_table_of_benchmarks() -> None:
    names = [row[0] for row in table_with(ROOT / "benchmarks" / "README.md", "command")[1:]]
    patterns = [pattern for name in names for pattern in INLINE.findall(name)]
    files = {path.name for path in RESULTS.glob("*.json*")}
    assert files == {path.name for pattern in patterns for path in RESULTS.glob(pattern)}


def best_of(column: list[float | None]) -> int:
    return min((value, place) for place, value in enumerate(column) if value is not None)[1]


@pytest.mark.parametrize(
    ("first", "peers", "run"),
    [(1, "peers-tinystories.json", "elastic-tinystories-g64-seed0.json"), (5, "peers-builtin.json", "tiny.json")],
)
def test_the_table_of_peers_in_the_readme_is_that_of_the_committed_rows(first: int, peers: str, run: str) -> None:
    shown = table_with(README, "6 bits")[first : first + 4]
    found = json.loads((RESULTS / peers).read_text())
    rounded = {r["target_bits"]: r["perplexity"] for r in json.loads((RESULTS / run).read_text())["rows"]
               if r["allocation"] == "rtn"}  # fmt: skip
    ours = {row["target_bits"]: row["perplexity"] for row in found["elastic"] if row["group_size"] == 64}
    best = {row["bits"]: row["best"] for row in found["verdicts"] if row["group_size"] == 64}
    assert shown[0][0].endswith(f"full precision {found['full precision']:.2f}")
    columns = [[best.get(bits), rounded[bits], ours[bits]] for bits in (2, 3, 4, 6, 8)]
    for column, cells in zip(columns, zip(*(row[1:] for row in shown[1:]), strict=True), strict=True):
        texts = ["not run" if value is None else f"{value:.2f}" for value in column]
        texts[best_of(column)] = f"**{texts[best_of(column)]}**"
        assert list(cells) == texts


def test_the_figure_shows_the_rows_that_its_caption_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    from benchmarks import overview

    drawn: dict[str, tuple[list[float], list[float]]] = {}
    plot = Axes.plot

    def recorded(self: Any, x: list[float], y: list[float], *args: Any, **named: Any) -> Any:
        drawn[named["label"]] = (list(x), list(y))
        return plot(self, x, y, *args, **named)

    monkeypatch.setattr(Axes, "plot", recorded)
    found = json.loads(overview.ROWS.read_text())
    overview.draw(found, tmp_path / "figure.png")
    ours = [row for row in found["elastic"] if row["group_size"] == overview.GROUP_SIZE]
    line = next(value for label, value in drawn.items() if label.startswith("this project"))
    assert line == ([row["used_bits"] for row in ours], [row["perplexity"] for row in ours])
    assert len(drawn) == 1 + len(overview.PEERS)
    for bits, perplexity in drawn.values():
        assert len(bits) == len(perplexity) >= 3
    assert overview.IMAGE.read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------ examples for developers


@pytest.mark.parametrize("group_size", [64, 2**16])
def test_the_slice_scheme_that_the_guide_shows_keeps_the_contract(group_size: int) -> None:
    guide = (ROOT / "docs" / "developer" / "add-a-slice-scheme.md").read_text(encoding="utf-8")
    example = guide.split("```python\n")[1].split("```")[0]
    assert example.startswith("# my_slices.py")
    space: dict[str, Any] = {"__name__": "my_slices"}
    exec(compile(example, "my_slices.py", "exec"), space)
    torch.manual_seed(0)
    weight = torch.randn(12, 172, requires_grad=True)  # 172 is no multiple of 64
    scheme = space["SpreadSlices"](12, 172, (2, 1, 1, 2, 2), group_size)
    packed = scheme.pack(weight)
    errors = []
    for n_slices, depth in enumerate(scheme.depths, start=1):
        assert torch.equal(packed.weight_at(depth), scheme.weight_at(weight, n_slices))
        errors.append((packed.weight_at(depth) - weight).norm().item())
    assert errors == sorted(errors, reverse=True)
    scheme(weight).square().sum().backward()
    assert bool((scheme.log_width.grad != 0).all())
    assert weight.grad is not None
    assert bool((weight.grad != 0).any())
    flat = torch.full((12, 20), 0.3)
    torch.testing.assert_close(space["SpreadSlices"](12, 20).pack(flat).weight_at(8), flat, rtol=2**-7, atol=0)
