"""Commands that need no trainer: plain functions, their arguments parsed from their signatures."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli

from mobiq_lightning.errors import CheckpointError, RecipeError


def run(function: Callable[..., None], arguments: list[str]) -> None:
    """Runs a function of this module on a command line; ``--max-bits`` and ``--max_bits`` are the same.

    Raises:
        RecipeError: If the command line does not fit the function.
    """
    name = function.__name__

    class Parser(ArgumentParser):
        """Says what is wrong in one line instead of a page of usage."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise RecipeError(f"{name}: {message}")

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    normal = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in arguments]
    parameters = signature(function).parameters.values()
    switches = {f"--{p.name}" for p in parameters if isinstance(p.default, bool)}
    alone = [*(following.startswith("-") for following in normal[1:]), True][: len(normal)]
    normal = [f"{a}=true" if a in switches and bare else a for a, bare in zip(normal, alone, strict=True)]
    first = next(iter(parameters))
    if first.default is not first.empty and normal and not normal[0].startswith("-"):  # RUN where it may be left out
        normal[0] = f"--{first.name}={normal[0]}"
    auto_cli(function, args=normal, as_positional=True, parser_class=Parser)


def generate(
    run: str,
    prompt: str = "",
    bits: float = 4.0,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    max_bits: int | None = None,
) -> None:
    """Continues a prompt with an elastic checkpoint, and prints the text and the bits that were used.

    Args:
        run: Run folder, elastic checkpoint or hub id.
        prompt: Text to continue; must not be empty.
        bits: Average bits per weight to run at.
        max_new_tokens: Tokens to add at most.
        temperature: 0 takes the likeliest token; above, tokens are sampled at this temperature.
        seed: Of the sampling.
        max_bits: Load only the planes up to this depth.
    """
    if not prompt.strip():
        raise RecipeError(
            'generate: --prompt is missing or empty; give the text to continue, as in --prompt "Once upon"'
        )
    from mobiq_lightning.serving import continue_prompt

    text, used = continue_prompt(run, prompt, bits, max_new_tokens, temperature, seed, max_bits)
    print(text)
    print(
        f"[{bits:g} bits asked for; used {used.code_bits:.3f} code bits per weight, {used.all_in_bits:.3f} with scales and "
        f"routers, over {used.n_tokens} tokens]",
        file=sys.stderr,
    )


def export(run: str, to: str = "", max_bits: int | None = None, overwrite: bool = False) -> None:
    """Writes a copy of an elastic checkpoint, whole or with its first planes only.

    Args:
        run: Run folder or elastic checkpoint.
        to: The new folder.
        max_bits: Keep only the planes up to this depth; must be a prefix of the slices.
        overwrite: Replace the folder if it is there.
    """
    if not to:
        raise RecipeError("export: --to is missing; give the new folder, as in --to exported")
    from mobiq_lightning.checkpoint import export as export_checkpoint

    folder = export_checkpoint(run, to, max_bits, overwrite)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{folder}: {size / 1e6:,.1f} MB of tensors")


def inspect(run: str) -> None:
    """Prints what an elastic checkpoint holds: layers, planes, routers, measured bits, provenance.

    Args:
        run: Run folder or elastic checkpoint.
    """
    from mobiq_lightning.checkpoint import summarize_checkpoint
    from mobiq_lightning.commands.inspect import print_summary

    print_summary(summarize_checkpoint(run))


def verify(run: str) -> None:
    """Checks hashes, shapes, scales, codes, thresholds and a forward pass at every depth; names what is damaged.

    Args:
        run: Run folder or elastic checkpoint.
    """
    from mobiq_lightning.checkpoint import verify as verify_checkpoint

    def report(name: str, problems: list[str]) -> None:
        print(f"{'ok     ' if not problems else 'DAMAGED'}  {name}", flush=True)
        for problem in problems:
            print(f"         - {problem}", flush=True)

    problems = verify_checkpoint(run, report)
    if problems:
        raise CheckpointError(f"{run}: {len(problems)} problem(s). Copy or export the checkpoint again")


def evaluate(
    run: str,
    tasks: str = "",
    bits: str = "2,3,4",
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: str | None = None,
    source: str | None = None,
    max_bits: int | None = None,
) -> None:
    """Runs tasks of lm-evaluation-harness at several bits, and appends what they give to results.json.

    Args:
        run: Run folder or elastic checkpoint.
        tasks: Names of tasks, or paths of task YAML files, separated by commas.
        bits: Budgets, separated by commas.
        limit: Examples per task at most.
        num_fewshot: Examples in the prompt; by default what the task says.
        batch_size: Requests that go through the model at once.
        include_path: Folder with further task YAML files.
        source: Full-precision model to evaluate beside, a folder or hub id.
        max_bits: Load only the planes up to this depth.
    """
    names = [name for name in tasks.split(",") if name]
    if not names:
        raise RecipeError("evaluate: --tasks is missing; name tasks or task files, as in --tasks arc_easy,my_task.yaml")
    try:
        budgets = [float(b) for b in bits.split(",")]
    except ValueError as error:
        raise RecipeError(f"evaluate: --bits {bits}: give numbers separated by commas, as in --bits 2,3,4") from error
    from mobiq_lightning.evaluation import evaluate_checkpoint, print_harness

    folder = Path(include_path) if include_path else None
    print_harness(evaluate_checkpoint(run, names, budgets, limit, num_fewshot, batch_size, folder, source, max_bits))


def latency(
    run: str = "",
    shapes: str = "",
    sections: str = "",
    to: str = "latency",
    minutes: float = 9.0,
    tune: bool = False,
    warm_up: bool = False,
) -> None:
    """Times products with sliced weights on this machine, beside plain weights and the bandwidth of its memory.

    On CUDA the Triton kernels are timed, elsewhere the CPU reference; the output says which. Weights are random.

    Args:
        run: Run folder or elastic checkpoint whose shapes are taken; by default those of known models.
        shapes: Instead: llama-2-7b, llama-3-8b, llama-3-70b, small, one part as in llama-2-7b.down, or ROWSxCOLUMNS,
            separated by commas.
        sections: check, ceilings, decode, batch, prefill, model, separated by commas; by default all that the device has.
        to: Folder for latency.json and latency.png.
        minutes: Stop after so long; rows that were measured are kept.
        tune: Instead: find how the kernels divide their work best on this GPU, and write the table of it.
        warm_up: Instead: compile all kernels that RUN needs on this GPU, so that serving it does not.
    """
    if tune and warm_up:
        raise RecipeError("latency: --tune and --warm_up are two different things; give one")
    if warm_up:
        from mobiq_lightning.commands.latency import warm_up_checkpoint

        warm_up_checkpoint(run)
        return
    if tune:
        from mobiq_lightning.latency import tune_here

        tune_here(run, shapes, Path(to), minutes)
        return
    from mobiq_lightning.latency import measure

    measure(run, shapes, sections, Path(to), minutes)


COMMANDS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (generate, export, inspect, verify, evaluate, latency)
}
