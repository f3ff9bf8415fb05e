"""Dependencies point one way, and nothing in the package disturbs what it is used in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mobiq_lightning"
FORBIDDEN = {
    "packing.py": {"lightning", "transformers", "datasets", "mobiq_lightning"},
    "kernels": {"lightning", "transformers", "datasets", "mobiq_lightning.strategies", "mobiq_lightning.layers"},
    "strategies": {
        "lightning",
        "transformers",
        "datasets",
        "triton",
        "mobiq_lightning.layers",
        "mobiq_lightning.module",
    },
    "layers.py": {"lightning", "transformers", "datasets", "triton", "mobiq_lightning.module"},
    "hidden_states.py": {"lightning", "datasets", "mobiq_lightning.module", "mobiq_lightning.callbacks"},
    "dial.py": {"lightning", "transformers", "datasets", "triton", "mobiq_lightning.checkpoint"},
    "checkpoint": {"lightning", "datasets", "triton", "mobiq_lightning.callbacks", "mobiq_lightning.training_cli"},
    "latency": {"datasets", "triton", "mobiq_lightning.callbacks", "mobiq_lightning.training_cli"},
    "warm_up.py": {"lightning", "datasets", "triton", "mobiq_lightning.callbacks", "mobiq_lightning.latency"},
    "policy.py": {"lightning", "transformers", "torch"},
    "metrics.py": {"lightning", "transformers", "datasets", "mobiq_lightning.module"},
    "module.py": {"mobiq_lightning.callbacks", "mobiq_lightning.training_cli", "datasets"},
}


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("place", FORBIDDEN)
def test_dependencies_point_one_way(place: str) -> None:
    root = PACKAGE / place
    for path in [root] if root.is_file() else root.rglob("*.py"):
        wrong = {i for i in imports_of(path) for f in FORBIDDEN[place] if i == f or i.startswith(f + ".")}
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}"


def test_only_the_text_module_imports_datasets() -> None:
    users = {p.name for p in PACKAGE.rglob("*.py") if "datasets" in {i.split(".")[0] for i in imports_of(p)}}
    assert users == {"text.py"}


def test_importing_the_package_and_its_strategies_changes_no_global_state() -> None:
    code = (
        "import os, random, torch; before = (torch.get_default_dtype(), torch.get_rng_state().sum(), random.getstate(),"
        " dict(os.environ), torch.get_num_threads());"
        "import mobiq_lightning.strategies, mobiq_lightning.layers, mobiq_lightning.metrics;"
        "after = (torch.get_default_dtype(), torch.get_rng_state().sum(), random.getstate(),"
        " dict(os.environ), torch.get_num_threads()); assert before == after"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_imports_without_gpu_and_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import mobiq_lightning.checkpoint.loading, mobiq_lightning.kernels"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_serving_a_checkpoint_needs_no_training_framework() -> None:
    code = "import sys, mobiq_lightning.checkpoint.loading; assert not {'lightning', 'datasets', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
