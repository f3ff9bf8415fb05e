"""What the kernels become for sm_80 and sm_90, compiled on this machine: no GPU is needed, Triton brings the assembler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

INSTRUCTIONS_PER_WEIGHT = {"2 bits only": 1.65, "all depths": 2.6}
"""The most that the main loop may spend, at one token and groups of 128: more, and the GPU's instructions are the limit long
before its memory."""

COMPILED = (
    "of 1 token, 2 bits only, groups of 128, 1 tile",
    "of 1 token, all depths, groups of 128, 1 tile",
    "of (16|64) tokens, all depths",
    "grouped, all depths",
    "dequantize to 3",
    "prepare and route, norm",
    "prepare a few, gated",
    # For one architecture each: the smaller the groups, the longer the compiler takes.
    "of 1 token, all depths, groups of 32,.*sm_80",
    "of 1 token, even depths, groups of 32,.*sm_90",
    "of 1 token, all depths, groups of 64,.*sm_90",
    "of 1 token, all depths, groups of 128, 2 tile.*sm_80",
    "of 32 tokens, all depths.*sm_80",
    "of 8 tokens, all depths.*sm_90",
)
"""Patterns of what is compiled here; without one, ``python -m benchmarks.compiled_kernels`` compiles every variant."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compiled_kernels"]
    root = Path(__file__).parents[2]  # benchmarks are not installed
    made = subprocess.run(
        [*command, "|".join(COMPILED)], env=environment, cwd=root, capture_output=True, text=True, timeout=280
    )
    assert made.returncode == 0, made.stderr
    lines = [json.loads(line) for line in made.stdout.splitlines()]
    return {(line["name"], line["architecture"]): line for line in lines}


def test_every_kernel_is_compiled_for_both_architectures(compiled: dict[Any, dict[str, Any]]) -> None:
    names = {name.split(" ")[0].rstrip(",") for name, _ in compiled}
    assert names == {"decode", "grouped", "dequantize", "prepare"}
    assert {architecture for _, architecture in compiled} == {80, 90}


def test_no_kernel_spills_registers(compiled: dict[Any, dict[str, Any]]) -> None:
    assert {key: line["spills"] for key, line in compiled.items() if line["spills"]} == {}


def test_shared_memory_fits_every_supported_gpu(compiled: dict[Any, dict[str, Any]]) -> None:
    limit = 99 * 1024  # of a program, on sm_86 and sm_89
    assert {key: line["shared_bytes"] for key, line in compiled.items() if line["shared_bytes"] > limit} == {}


def test_unpacked_weights_stay_in_registers(compiled: dict[Any, dict[str, Any]]) -> None:
    loops = [(key, loop) for key, line in compiled.items() for loop in line["loops"]]
    assert len(loops) > 20
    assert [key for key, loop in loops if loop["shared_stores"] or loop["shuffles"]] == []


def test_hopper_multiplies_more_than_eight_tokens_with_its_own_instructions(
    compiled: dict[Any, dict[str, Any]],
) -> None:
    for (name, architecture), line in compiled.items():
        wide = name.startswith("grouped") or any(f"of {n} tokens" in name for n in (16, 32, 64))
        if line["loops"]:
            assert line["wgmma"] == (architecture == 90 and wide), name


def test_the_main_loop_of_few_tokens_leaves_the_memory_to_be_the_limit(compiled: dict[Any, dict[str, Any]]) -> None:
    for (name, architecture), line in compiled.items():
        for kind, limit in INSTRUCTIONS_PER_WEIGHT.items():
            if f"of 1 token, {kind}, groups of 128" in name:
                assert max(loop["per_weight"] for loop in line["loops"]) <= limit, (name, architecture)
