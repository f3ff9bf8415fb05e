"""Checks of what a recipe puts together, made before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from mobiq_lightning.calibration.schedule import Stage, stage_problems
from mobiq_lightning.errors import RecipeError, RunFolderError
from mobiq_lightning.nn import RouterFactory, SliceFactory
from mobiq_lightning.strategies import TrainableCodes
from mobiq_lightning.strategies.base import BudgetSchedule, Objective
from mobiq_lightning.strategies.transform_base import Transform

_SCHEMES, _EXPERTS = ".schemes.", "experts-0-"
"""What names of slice schemes in a calibration hold, and those of the first expert of a block."""


def check_plugins(
    slices: SliceFactory,
    router: RouterFactory,
    budget: BudgetSchedule,
    objectives: tuple[Objective, Objective],
    epochs_per_block: int,
    stages: Sequence[Stage],
    eval_bits: Sequence[float],
    transform: Transform,
) -> None:
    """Builds every plug-in once on a tiny layer and checks that they fit together.

    Args:
        slices: Makes slice schemes.
        router: Makes routers.
        budget: The budget schedule.
        objectives: What a block is trained to match, and what the whole model is trained to match.
        epochs_per_block: Epochs of each block.
        stages: What is trained when.
        eval_bits: Budgets of the comparison, in bits.
        transform: What is done to weights and inputs before weights are sliced.

    Raises:
        RecipeError: Naming everything that does not fit.
    """
    scheme = slices(8, 16)
    built = router(16, len(scheme.slice_bits))
    depths = scheme.depths
    lowest, highest = depths[0], depths[-1]
    problems = list(_transform_problems(transform))
    if epochs_per_block < 1:
        problems.append(f"model.epochs_per_block ({epochs_per_block}) must be at least 1")
    problems += stage_problems(stages, depths, isinstance(scheme, TrainableCodes), epochs_per_block)
    for key, objective in zip(("objective", "model_objective"), objectives, strict=True):
        missing = [depth for depth in objective.depths if depth not in depths]
        if missing:
            problems.append(f"model.{key}: depths {missing} are no prefix of the slices; depths are {list(depths)}")
    for number, stage in enumerate(stages):
        if stage.scope == "model" and stage.depth is None and not stage.trains("routers") and not objectives[1].depths:
            problems.append(
                f"model.stages[{number}]: trains no depth; give one, or depth_weights in model.model_objective"
            )
    end_to_end = any(stage.scope == "model" and stage.trains("routers") for stage in stages)
    if built.needs_model_stage and not end_to_end:
        problems.append(
            f"model.stages: {type(built).__name__} learns end to end, and no stage with scope model trains routers; add one"
        )
    if any(stage.trains("codes") for stage in stages) and any(stage.trains("transforms") for stage in stages):
        problems.append(
            "model.stages: codes are those of fixed transforms; where a stage trains codes, none trains transforms"
        )
    low, high = budget.bounds
    if not lowest <= low <= high <= highest:
        given = f"the slices {list(scheme.slice_bits)} give {lowest} to {highest}"
        problems.append(f"model.budget: asks for {low:g} to {high:g} bits; {given}")
    if not eval_bits:
        problems.append("model.eval_bits: the list is empty; give at least one budget, as in [2, 3, 4]")
    outside = [bits for bits in eval_bits if not lowest <= bits <= highest]
    if outside:
        problems.append(f"model.eval_bits: {outside} lie outside of what the slices give, {lowest} to {highest}")
    if problems:
        raise RecipeError("\n".join(problems))


def _transform_problems(transform: Transform) -> Iterator[str]:
    """What keeps a transform from being recorded in a checkpoint, which would else be found at the end of a run."""
    transform.for_input(16)
    try:
        json.dumps(transform.describe())
    except (AttributeError, TypeError) as error:
        yield (
            f"model.transform: {type(transform).__name__} must keep the arguments of its __init__ as attributes of the same "
            f"names, and they must be plain values, so that a checkpoint can record them ({error})"
        )


def check_resumed(stored: Collection[str], own: Iterable[str], folder: Path) -> None:
    """Refuses a training checkpoint from before experts were sliced.

    Args:
        stored: Names of the tensors that it holds, of some or all blocks.
        own: Names of the modules of this calibration.
        folder: The run folder.

    Raises:
        RunFolderError: Saying how to begin anew.
    """
    blocks = {name.partition(_SCHEMES)[0] for name in own if _SCHEMES in name and _EXPERTS in name}
    of_blocks = [[name for name in stored if name.startswith(f"{block}{_SCHEMES}")] for block in blocks]
    lacking = any(names and not any(_EXPERTS in name for name in names) for names in of_blocks)
    if lacking:
        raise RunFolderError(
            f"{folder} was begun by a version that left experts in full precision, which are sliced now; begin it anew with "
            "--overwrite, or in another trainer.default_root_dir"
        )


def check_processes(then: int, now: int, batch_size: int, folder: Path) -> None:
    """Refuses to go on with another number of processes: a step would be of other windows.

    Args:
        then: Processes that shared a step when the training checkpoint was written.
        now: Processes that share one now.
        batch_size: Windows of a process in a step.
        folder: The run folder.

    Raises:
        RunFolderError: Saying how to go on.
    """
    if then != now:
        raise RunFolderError(
            f"{folder} holds a run of {then} processes, and this one has {now}: a step would be of {now * batch_size} windows "
            f"in place of {then * batch_size}. Give --trainer.devices (times trainer.num_nodes) {then}, or another "
            "trainer.default_root_dir, or --overwrite"
        )


def check_one_process(block_inputs: str, world_size: int) -> None:
    """Refuses several processes that share batches where blocks are calibrated by themselves, each by one process.

    Raises:
        RecipeError: Saying what to use.
    """
    if block_inputs == "full" and world_size > 1:
        raise RecipeError(
            f"model.block_inputs: full, and {world_size} processes that share each batch (trainer.devices, trainer.num_nodes): "
            "blocks that do not depend on each other are calibrated by one process each. Give --trainer.devices 1, and start "
            "`fit --blocks FIRST-LAST` once for each device; or set model.block_inputs to calibrated"
        )


def check_strategy(strategy: Strategy) -> None:
    """Refuses trainer strategies under which block by block calibration would go wrong.

    Raises:
        RecipeError: Saying why, and what to use.
    """
    if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
        raise RecipeError(
            "trainer.strategy: only the current block has gradients, so DDP must look for unused parameters; "
            "use ddp_find_unused_parameters_true"
        )
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise RecipeError(
            f"trainer.strategy: {type(strategy).__name__} shards parameters, which block by block calibration cannot "
            "use, as it holds one block on the device anyway; use auto or ddp_find_unused_parameters_true"
        )
