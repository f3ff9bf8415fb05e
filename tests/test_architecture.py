"""Every module imports only from rooms below its own, through their faces, and nothing disturbs what it is used in."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mobiq_lightning"
NAME = PACKAGE.name
LAYERS = [
    "version",
    "errors",
    "extras files input_files console environment tensor_memo",
    "packing",
    "runs",
    "loggers",
    "strategies kernels",
    "nn",
    "sources",
    "runtime",
    "checkpoint",
    "serving",
    "evaluation",
    "calibration",
    "outliers latency",
    "callbacks",
    "jobs",
    "comparison",
    "commands",
    "cli",
    "__init__ __main__",
]
"""Rooms of the package from the ground up: a room imports only from lines above its own."""
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms.split()}
OPEN = {"strategies", "kernels"}
"""Rooms whose modules are imported by name: plug-ins say which base they build on, and a kernel is imported where Triton is."""
HEAVY = {
    "packing": {"lightning", "transformers", "datasets", "triton"},
    "runs": {"torch", "lightning", "transformers", "datasets", "triton", "matplotlib"},
    "strategies": {"lightning", "transformers", "datasets", "triton"},
    "kernels": {"lightning", "transformers", "datasets"},
    "nn": {"lightning", "transformers", "datasets", "triton"},
    "runtime": {"lightning", "datasets", "triton"},
    "checkpoint": {"lightning", "datasets", "triton"},
    "latency": {"lightning", "datasets", "triton"},
}
"""What no module of a room may import, not even within a function."""
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imports_of(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Modules that a file imports anywhere, each with the names taken from it."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, tuple(alias.name for alias in node.names)))
    return found


def own_imports(path: Path) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Of the imports of a file those from this package: the room, the module, the names."""
    for module, names in imports_of(path):
        parts = module.split(".")
        if parts[0] == NAME:
            rooms = [parts[1]] if len(parts) > 1 else [n if n in LEVEL else "__init__" for n in names or ("",)]
            yield from ((found, module, names) for found in rooms)


@cache
def exports_of(folder: Path) -> dict[str, str]:
    """Names that the face of a package exports, each with the module that it comes from."""
    tree = ast.parse((folder / "__init__.pyi").read_text(encoding="utf-8"))
    return {a.name: node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}


def test_every_module_imports_only_from_rooms_below_its_own() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path in MODULES
        for target, module, _ in own_imports(path)
        if target != room(path) and LEVEL[target] >= LEVEL[room(path)]
    ]
    assert wrong == []


def test_every_room_is_on_the_list_and_the_list_names_no_other() -> None:
    assert {room(path) for path in MODULES} == set(LEVEL)


def test_modules_of_a_room_do_not_import_each_other_in_a_circle() -> None:
    names = {".".join((NAME, *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in MODULES}
    graph = {
        name: {
            candidate
            for module, imported in runtime_imports_of(path)
            for candidate in (module, *(f"{module}.{n}" for n in imported))
            if candidate in names and candidate != name
        }
        for name, path in names.items()
    }
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in graph[name]:
                walk(target, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def runtime_imports_of(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Imports that run: not those for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, tuple(alias.name for alias in node.names)


def test_other_rooms_import_what_a_face_exports() -> None:
    wrong = []
    for path in MODULES:
        for target, module, names in own_imports(path):
            folder = PACKAGE / target
            if target == room(path) or target in OPEN or not (folder / "__init__.pyi").is_file():
                continue
            face = PACKAGE.joinpath(*module.split(".")[1:])
            behind = not (face / "__init__.pyi").is_file()  # a module instead of the package that it belongs to
            missing = behind or not set(names) <= set(exports_of(face))
            wrong += [f"{path.relative_to(PACKAGE)} imports {', '.join(names)} from {module}"] if missing else []
    assert wrong == []


def test_tests_import_from_a_face_what_it_exports() -> None:
    wrong = []
    for path in Path(__file__).parent.rglob("*.py"):
        for target, module, names in own_imports(path):
            folder = PACKAGE / target
            if module != f"{NAME}.{target}" and (folder / "__init__.pyi").is_file():
                exported = set(names) & set(exports_of(folder))
                wrong += [f"{path.name} imports {', '.join(exported)} from {module}"] if exported else []
    assert wrong == []


FACES = sorted(path.parent for path in PACKAGE.rglob("__init__.pyi") if path.parent != PACKAGE)


@pytest.mark.parametrize("folder", FACES, ids=lambda folder: folder.relative_to(PACKAGE).as_posix())
def test_a_face_exports_what_is_there_and_no_name_that_a_module_has(folder: Path) -> None:
    exports = exports_of(folder)
    modules = {path.stem for path in folder.glob("*.py")} | {path.name for path in folder.iterdir() if path.is_dir()}
    assert not modules & set(exports)
    for name, module in exports.items():
        tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
        defined = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        targets = [t for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign)) for t in targets_of(n)]
        assert name in defined | {t.id for t in targets if isinstance(t, ast.Name)}, f"{module} defines no {name}"


def targets_of(node: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    found = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [t for target in found for t in (target.elts if isinstance(target, ast.Tuple) else [target])]


@pytest.mark.parametrize("place", HEAVY)
def test_rooms_name_no_library_that_they_must_run_without(place: str) -> None:
    for path in (PACKAGE / place).rglob("*.py"):
        wrong = {module for module, _ in imports_of(path)} & HEAVY[place]
        wrong |= {module for module, _ in imports_of(path) if module.split(".")[0] in HEAVY[place]}
        assert not wrong or NATIVE.get(path.relative_to(PACKAGE).as_posix(), set()) >= wrong, f"{path}: {wrong}"


NATIVE: dict[str, set[str]] = {"runs/shared_work.py": {"torch"}}
"""Modules that may import what their room must run without, each with what."""


def test_only_the_text_module_imports_datasets() -> None:
    users = {p.name for p in MODULES if "datasets" in {module.split(".")[0] for module, _ in imports_of(p)}}
    assert users == {"text.py"}


def test_code_that_comes_with_a_model_is_never_run() -> None:
    # transformers asks on a terminal where nothing is said, and a pipe of yes answers.
    wrong = []
    for path in MODULES:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and may_run_code(call):
                given = {k.arg: ast.unparse(k.value) for k in call.keywords}
                if given.get("trust_remote_code") != "False":
                    wrong.append(f"{path.relative_to(PACKAGE)}:{call.lineno}: {ast.unparse(call)[:80]}")
    assert wrong == []


def may_run_code(call: ast.Call) -> bool:
    """Whether a call makes a model, a config or a tokenizer of what its files name."""
    if isinstance(call.func, ast.Name):
        return call.func.id == "HFLM"
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    makes = isinstance(call.func, ast.Attribute) and call.func.attr in ("from_pretrained", "from_config")
    return makes and isinstance(owner, ast.Name) and owner.id.startswith("Auto")


@pytest.mark.parametrize(
    ("call", "may"),
    [
        ("AutoTokenizer.from_pretrained(x)", True),
        ("AutoModelForCausalLM.from_config(x)", True),
        ("HFLM(pretrained=x)", True),
        ("LlamaConfig(x)", False),
        ("model.save_pretrained(x)", False),
    ],
)
def test_calls_that_may_run_code_are_found(call: str, may: bool) -> None:
    assert may_run_code(ast.parse(call, mode="eval").body) == may  # type: ignore[arg-type]


def loaded_by(code: str) -> set[str]:
    """Libraries that a fresh interpreter has loaded after running `code`."""
    code += "; import sys; print(*{name.split('.')[0] for name in sys.modules})"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_importing_the_package_changes_no_global_state_but_one_import_hook() -> None:
    code = (
        "import os, random, sys, torch; before = (torch.get_default_dtype(), torch.get_rng_state().sum(), random.getstate(),"
        " dict(os.environ), torch.get_num_threads()); finders = list(sys.meta_path);"
        "import mobiq_lightning.strategies, mobiq_lightning.nn, mobiq_lightning.evaluation.metrics;"
        "after = (torch.get_default_dtype(), torch.get_rng_state().sum(), random.getstate(),"
        " dict(os.environ), torch.get_num_threads()); assert before == after;"
        "added = [type(f) for f in sys.meta_path if f not in finders and type(f).__module__.startswith('mobiq')];"
        "assert [(t.__module__, t.__name__) for t in added] in"
        " ([], [('mobiq_lightning.checkpoint.registration', '_Watcher')]), added;"
        "import transformers.quantizers.auto; assert all(type(f) not in added for f in sys.meta_path)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_imports_without_gpu_and_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; from mobiq_lightning.checkpoint import load; import mobiq_lightning.kernels"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_policy_of_a_curve_chooses_bits_without_torch() -> None:
    # One of a checkpoint loads it: torch knows the name of the GPU, which tells whether stored speeds are of this machine.
    loaded = loaded_by(
        "from mobiq_lightning import BitsPolicy; from mobiq_lightning.serving.policy import CurvePoint;"
        "policy = BitsPolicy([CurvePoint(2, 40.0, 200.0), CurvePoint(4, 25.0, 100.0)]);"
        "assert [policy.bits_for_queue(0), policy.bits_for_queue(99), policy.bits_for_speed(150)] == [4, 2, 2]"
    )
    assert not {"torch", "transformers", "lightning"} & loaded


def test_results_are_read_without_torch() -> None:
    assert not {"torch", "transformers", "lightning"} & loaded_by("from mobiq_lightning.runs import summarize, verdict")
