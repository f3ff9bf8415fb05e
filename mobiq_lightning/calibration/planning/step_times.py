"""What steps of a run take on this machine, measured on a random model of the same shapes with one or two decoder blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mobiq_lightning.calibration.planning.bench import Bench, StepTimes
from mobiq_lightning.calibration.planning.memory import rows_at_once
from mobiq_lightning.calibration.planning.sizes import ModelSizes
from mobiq_lightning.strategies.together import alone

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration
    from mobiq_lightning.sources import TextWindows

_WHOLE = 4
"""Models of so many blocks are measured whole; of larger ones, one and two blocks, and others by what the second adds."""


PER_SECOND = 2e10
"""Products and sums per second that are assumed where nothing is measured; only relations between steps matter then."""


def guessed_times(sizes: ModelSizes, module: ElasticCalibration, text: TextWindows) -> StepTimes:
    """What steps take in relation to each other, by weights and tokens alone.

    A pass takes two operations for each weight and token, its backward pass twice as many, and 40 for each weight whose code
    is computed.
    """
    tokens, n_slices = text.batch_size * text.seq_len, len(sizes.slice_bits)
    whole = sizes.sliced + sizes.vocabulary * sizes.width
    found = StepTimes()
    for number, stage in enumerate(module.stages):
        of_model = stage.scope == "model"
        depths = (module.model_objective if of_model else module.objective).depths
        passes = len(depths if stage.depths is None else stage.depths)
        weights = whole if of_model else sizes.sliced_of_block
        trained = passes + n_slices * stage.trains("routers")
        others = of_model * (1 + 2 * stage.trains("routers"))
        found.stages[number] = weights * (6 * tokens * trained + 2 * tokens * others + 40 * trained) / PER_SECOND
    found.read = sizes.sliced_of_block * (2 * tokens + 40) / PER_SECOND
    found.gains = whole * (2 * 4 * text.seq_len + 40) / PER_SECOND
    found.compared = whole * 2 * text.eval_batch_size * text.eval_seq_len / PER_SECOND
    found.written = whole * 2 * rows_at_once(sizes, text) / PER_SECOND
    return found


def measure_steps(
    config: Any, sizes: ModelSizes, module: ElasticCalibration, text: TextWindows, device: torch.device
) -> StepTimes:
    """Takes one step of each kind on random models of the shapes of a model. No random state is changed.

    Args:
        config: The configuration of the model, of transformers.
        sizes: Its sizes.
        module: What the recipe says of the calibration.
        text: What it says of the text.
        device: Where to measure.

    Raises:
        RuntimeError: Or another error, if no such model can be made or run; nothing is known then.
    """
    counts = (sizes.n_blocks,) if sizes.n_blocks <= _WHOLE else (1, 2)
    # Each process takes a step as often as it thinks fit, so none may wait for another within one.
    with alone(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        benches = [
            Bench(config, count, sizes, module, text, device).times(blocks=number == 0)
            for number, count in enumerate(counts)
        ]
    if device.type == "cuda":  # what the run itself takes is what its peak is to say
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if len(benches) == 1:
        return benches[0]
    one, two = benches

    def of_all(first: float, second: float) -> float:
        return first + (sizes.n_blocks - 1) * max(0.0, second - first)

    stages = {
        number: seconds if module.stages[number].scope == "block" else of_all(seconds, two.stages[number])
        for number, seconds in one.stages.items()
    }
    return StepTimes(
        stages,
        one.read,
        of_all(one.gains, two.gains),
        of_all(one.compared, two.compared),
        of_all(one.written, two.written),
    )
