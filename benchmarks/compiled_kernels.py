"""What the kernels become for a GPU that need not be there: registers, spills, instructions per weight.

``python -m benchmarks.compiled_kernels`` compiles every variant for sm_80 and sm_90 with the assembler that comes with
Triton and prints one line of JSON for each. Must run without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from mobiq_lightning.kernels.decode import decode_columns, decode_kernel, decode_warps
from mobiq_lightning.kernels.dequantize import dequantize_kernel
from mobiq_lightning.kernels.grouped import BLOCK_TOKENS, WARPS, grouped_kernel
from mobiq_lightning.kernels.prepare import prepare_kernel

ARCHITECTURES = (80, 90)
_LOOP_INSTRUCTIONS = 60  # shorter loops are no main loops


@dataclass(frozen=True)
class Loop:
    """One loop of a compiled kernel.

    Args:
        instructions: Its length.
        tensor_core: Its products of the tensor core.
        per_weight: Instructions per weight and thread, of the weights that one iteration multiplies.
        shared_stores: Stores to shared memory that are no copies from global memory.
        shuffles: Exchanges between threads.
    """

    instructions: int
    tensor_core: int
    per_weight: float
    shared_stores: int
    shuffles: int


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled.

    Args:
        name: Kernel and variant.
        architecture: 80 for sm_80.
        registers: Per thread.
        spills: Instructions that spill registers to memory.
        shared_bytes: Shared memory of a program.
        wgmma: Whether it uses Hopper's tensor core instructions.
        instructions: Of the whole kernel.
        loops: Those that multiply.
    """

    name: str
    architecture: int
    registers: int
    spills: int
    shared_bytes: int
    wgmma: bool
    instructions: int
    loops: list[Loop] = field(default_factory=list)


@dataclass(frozen=True)
class Variant:
    """A kernel with what it is compiled for.

    Args:
        name: Kernel and variant.
        kernel: What `triton.jit` made.
        types: Type of each argument that is no constant.
        constants: Value of each argument that is one.
        divisible: Sizes that are divisible by 16; pointers always are.
        warps: Warps of a program.
        weights_per_thread: Weights that a thread multiplies in one iteration.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    warps: int
    weights_per_thread: int


_PRODUCT_POINTERS = {"x_one": "*bf16", "x_two": "*bf16", "sums": "*fp32", "units": "*i32", "meta": "*i32", "y": "*bf16"}
_PRODUCT_SIZES = dict.fromkeys(("M", "N", "N_OUT", "T", "block0"), "i32")
_BFLOAT16_CODES = {"CODES_ARE_SUBNORMAL": True, "UNSCALE": 2.0**33}


def variants(architecture: int) -> Iterator[Variant]:
    """Everything that is compiled for an architecture."""
    yield from _decode_variants(architecture)
    yield from _grouped_variants(architecture)
    yield from _dequantize_variants()
    yield from _prepare_variants()


def _decode_variants(architecture: int) -> Iterator[Variant]:
    types = {**_PRODUCT_POINTERS, **_PRODUCT_SIZES, "bits": "*i32", "info": "*i32", "part": "*fp32", "counters": "*i32"}
    types |= {"tiles_per_program": "i32", "n_splits": "i32"}
    for tokens, tiles, stages, step in (
        *((1, 1, 4, s) for s in (32, 64, 128)),
        (1, 2, 3, 128),
        (8, 1, 4, 128),
        (16, 2, 3, 128),
        (32, 1, 3, 128),
        (64, 1, 3, 128),
    ):
        columns = decode_columns(tokens)
        warps = decode_warps(columns)
        for pairs, odd in ((False, False), (True, False), (True, True)):
            constants = {
                **_BFLOAT16_CODES,
                "BN": 128,
                "BM": columns,
                "BT": tiles,
                "BK": step,
                "BM_SUM": tokens,
                "BP_SUM": max(1, 16 // tokens),
                "STAGES": stages,
                "IS_MULTI_SPLIT": True,
                "USE_UNIT_PAIRS": pairs,
                "HAS_ODD_DEPTHS": odd,
                "MMA_SYNC_ORDER": columns == 8 or architecture < 90,
            }
            depths = "2 bits only" if not pairs else "all depths" if odd else "even depths"
            name = f"decode of {tokens} token{'s' * (tokens > 1)}, {depths}, groups of {step}, {tiles} tile(s) at once"
            yield Variant(
                name, decode_kernel, types, constants, ("N", "N_OUT"), warps, 128 * 128 * tiles // (32 * warps)
            )


def _grouped_variants(architecture: int) -> Iterator[Variant]:
    types = {**_PRODUCT_POINTERS, **_PRODUCT_SIZES}
    types |= dict.fromkeys(("order", "tile_depth", "tile_start", "tile_count"), "*i32")
    for odd in (False, True):
        constants = {
            **_BFLOAT16_CODES,
            "BN": 128,
            "BM": BLOCK_TOKENS,
            "BK": 128,
            "STAGES": 3,
            "ROW_BLOCKS_TOGETHER": 8,
            "HAS_ODD_DEPTHS": odd,
            "MMA_SYNC_ORDER": architecture < 90,
        }
        name = f"grouped, {'all' if odd else 'even'} depths"
        yield Variant(name, grouped_kernel, types, constants, ("N", "N_OUT"), WARPS, 128 * 128 // (32 * WARPS))


def _dequantize_variants() -> Iterator[Variant]:
    types = {"units": "*i32", "meta": "*i32", "out": "*bf16", "N": "i32", "K": "i32", "T": "i32", "block0": "i32"}
    for depth in (2, 3, 4, 8):
        constants = {"DEPTH": depth, "BN": 64, "BK": 128, "GROUP_SIZE": 128, "PADDED_GROUP": 128}
        yield Variant(f"dequantize to {depth} bits", dequantize_kernel, types, constants, ("N", "K"), 4, 64)


def _prepare_variants() -> Iterator[Variant]:
    types = {
        **dict.fromkeys(("x", "factor", "y", "x_one", "x_two"), "*bf16"),
        **dict.fromkeys(("sums", "router_hidden", "router_small", "thresholds", "part"), "*fp32"),
        **dict.fromkeys(("bits", "info", "depths", "counters"), "*i32"),
        **dict.fromkeys(("valid", "bits_read", "tokens_read"), "*i64"),
        **dict.fromkeys(("M", "K", "T", "x_stride", "factor_stride", "tokens_per_threshold"), "i32"),
        "eps": "fp32",
    }
    for meaning in ("plain", "norm", "gated"):
        constants = {
            **{"BT": 4, "BK": 128, "BK_ROW": 4096, "BH": 16, "BS": 8, "BP": 8},
            **{"GROUP_SIZE": 128, "PADDED_GROUP": 128, "N_SLICES": 5, "SCALE": 2.0**100, "UNSCALE": 2.0**33},
            **{"USE_NORM": meaning == "norm", "USE_GATE": meaning == "gated", "MMA_SYNC_ORDER": True},
        }
        aligned = ("K", "x_stride", "factor_stride")
        for name, routes, info in (
            ("prepare and route", True, True),
            ("prepare", False, False),
            ("prepare a few", False, True),
        ):
            chosen = {**constants, "USE_ROUTER": routes, "COUNT_READS": True, "STORE_INFO": info}
            yield Variant(f"{name}, {meaning}", prepare_kernel, types, chosen, aligned, 4, 1)


def compile_variant(variant: Variant, architecture: int) -> Compiled:
    """Compiles one variant for one architecture."""
    names = variant.kernel.arg_names
    types, constants = variant.types, variant.constants
    source = triton.compiler.ASTSource(
        fn=variant.kernel,
        signature={n: "constexpr" if n in constants else types[n] for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if n not in constants and (types[n].startswith("*") or n in variant.divisible)
        },
    )
    options = {"num_warps": variant.warps, "enable_fp_fusion": True}
    made: Any = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    resources, assembly = _disassemble(made.asm["cubin"])
    registers = re.search(r"REG:(\d+)", resources)
    assert registers is not None
    instructions, loops = _loops(assembly)
    return Compiled(
        variant.name,
        architecture,
        int(registers[1]),
        sum(_opcode(line) in ("LDL", "STL") for line in instructions),
        made.metadata.shared,
        "warp_group_dot" in made.asm["ttgir"],
        len(instructions),
        [_describe(loop, variant.weights_per_thread) for loop in loops],
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and instructions, by the tools that come with Triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run(
                [str(tools / command[0]), *command[1:], file.name], capture_output=True, text=True, check=True
            ).stdout
            for command in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )  # type: ignore[return-value]


def _loops(assembly: str) -> tuple[list[str], list[list[str]]]:
    """All instructions, and those of each innermost loop that multiplies."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    spans = []
    for at, line in enumerate(instructions):
        branch = re.search(r"BRA(?:\.\w+)*\s.*`\((\.L_\w+)\)", line)
        if branch and at - labels.get(branch[1], at) > _LOOP_INSTRUCTIONS:
            spans.append((labels[branch[1]], at + 1))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    loops = [instructions[a:b] for a, b in inner]
    return instructions, [loop for loop in loops if any("MMA" in _opcode(line) for line in loop)]


def _describe(loop: list[str], weights_per_thread: int) -> Loop:
    counts = Counter(_opcode(line) for line in loop)
    return Loop(
        len(loop),
        counts["HMMA"] + counts["HGMMA"],
        round(len(loop) / weights_per_thread, 2),
        counts["STS"],
        counts["SHFL"] + counts["PRMT"],
    )


def _opcode(instruction: str) -> str:
    without_predicate = re.sub(r"^@!?U?P\w+\s+", "", instruction)
    return without_predicate.split()[0].split(".")[0]


def report(pattern: str = "") -> Iterator[Compiled]:
    """Compiles the variants of which something matches a pattern: ``grouped, all depths, sm_90`` is the name of one and what
    it is compiled for.
    """
    for architecture in ARCHITECTURES:
        for variant in variants(architecture):
            if re.search(pattern, f"{variant.name}, sm_{architecture}"):
                yield compile_variant(variant, architecture)


if __name__ == "__main__":
    import sys

    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "TRITON_INTERPRET is set: there is nothing to compile"
    for compiled in report(sys.argv[1] if len(sys.argv) > 1 else ""):
        print(json.dumps(asdict(compiled)), flush=True)
