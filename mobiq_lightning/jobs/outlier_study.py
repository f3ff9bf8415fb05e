"""The study of outlier migration: a model calibrated for each precision alone and for all at once, each read at all of them."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mobiq_lightning.callbacks.outlier_migration import chosen_bits
from mobiq_lightning.checkpoint import load
from mobiq_lightning.console import say
from mobiq_lightning.environment import environment
from mobiq_lightning.errors import RecipeError
from mobiq_lightning.evaluation import wrap_for_rounding
from mobiq_lightning.files import write_text
from mobiq_lightning.jobs.cli import ElasticCLI
from mobiq_lightning.jobs.running import fit
from mobiq_lightning.nn import ElasticLinear, routed_inputs
from mobiq_lightning.outliers import (
    ALL,
    NONE,
    SHARED,
    InputErrors,
    TokenRecord,
    check_share,
    derive_recipes,
    full_perplexity,
    matrix_rows,
    overlap_metrics,
    own_calibration,
    print_matrix,
    print_overlaps,
    read_uniformly,
    same_bits,
    spread_windows,
    summarize_tokens,
    write_outliers,
)
from mobiq_lightning.runs import OUTLIERS, OUTLIERS_PLOT, OUTLIERS_TABLE, SharedWork
from mobiq_lightning.sources import Source, load_source
from mobiq_lightning.strategies.class_paths import describe_factory


class OutlierStudy(ElasticCLI):
    """The study of a recipe: a ``fit`` per precision and one as the recipe says, in sub-folders of its run folder.

    Args:
        arguments: The recipe, and keys that override it, as a command line.
        bits: Precisions that are compared; empty for all depths of the slices.
        share: Part of the tokens that counts as worst, above 0 and below 1.

    Raises:
        RecipeError: If a key or value cannot be used.
        RunFolderError: If the run folder holds something else.
    """

    def __init__(self, arguments: Sequence[str], bits: Sequence[int], share: float) -> None:
        check_share(share)
        self.bits, self.share = tuple(sorted(bits)), share
        own = [*(["--bits", ",".join(map(str, self.bits))] if bits else []), "--share", str(share)]
        self.command_line = shlex.join(["python", "-m", "mobiq_lightning", "outliers", *arguments, *own])
        super().__init__("fit", arguments)

    def fit(self) -> None:
        """Calibrates what is not calibrated yet, then measures."""
        self.bits = chosen_bits(self.model, self.bits)
        if self.trainer.world_size > 1:
            raise RecipeError(
                f"outliers: its runs follow each other in one process, on one device; trainer asks for "
                f"{self.trainer.world_size}. Give --trainer.devices 1"
            )
        root = self.run_folder.path
        recipes = derive_recipes(self.recipe, self.bits, root)
        commands: dict[str, str] = {}
        for number, (name, recipe) in enumerate(recipes.items()):
            path = root / f"{name}.yaml"
            commands[name] = f"python -m mobiq_lightning fit --config {path}"
            write_text(path, f"# {commands[name]}\n{yaml.safe_dump(recipe, sort_keys=False)}")
            say(f"[{number + 1}/{len(recipes)}] {name.replace('-', ' ')} in {root / name}")
            self._calibrate(path)
        self._measure(root, commands)

    def _calibrate(self, recipe: Path) -> None:
        """Runs ``fit`` on a recipe, or goes on with it; its own tables stay in its folder."""
        with contextlib.redirect_stdout(io.StringIO()):
            fit(recipe, overwrite=bool(self._get(self.config, "overwrite")))

    def _measure(self, root: Path, commands: dict[str, str]) -> None:
        source = load_source(self.model.pretrained, self.model.dtype_name)
        source.model.to(self.trainer.strategy.root_device)
        data = self.datamodule
        data.read(source.tokenizer, source.tokenizer_hash, "validate", SharedWork(root / SHARED))
        records = self._records(root, source)
        own = own_calibration(records, self.bits)
        tokens: dict[str, Any] = {
            "elastic": summarize_tokens(records[ALL], self.share),
            "own_calibration": summarize_tokens(own, self.share),
            "uncalibrated": summarize_tokens(records[NONE], self.share),
            "same_bits": same_bits(own, records[NONE], self.share),
        }
        found: dict[str, Any] = {
            "model": self.model.pretrained,
            "protocol": data.protocol.to_json(),
            "environment": environment(),
            "command": self.command_line,
            "runs": commands,
            "bits": list(self.bits),
            "share": self.share,
            "matrix": {"full_perplexity": full_perplexity(records[ALL]), "rows": matrix_rows(records, self.bits)},
            "tokens": tokens,
        }
        write_outliers(found, records[ALL], source.tokenizer, root)
        print_overlaps(tokens)
        print_matrix(found["matrix"])
        say(f"{', '.join((OUTLIERS, OUTLIERS_TABLE, OUTLIERS_PLOT))} are in {root}.")
        self._log(found)

    def _records(self, root: Path, source: Source) -> dict[str, TokenRecord]:
        """What every calibration does at every precision; one checkpoint is in memory at a time."""
        full, data = source.model, self.datamodule
        assert data.evaluation is not None
        batches = spread_windows(data.evaluation, data.eval_batch_size, None)
        records: dict[str, TokenRecord] = {}
        rounded = None
        for name in (*map(str, self.bits), ALL):
            say(f"reading calibrated at {name} at {', '.join(map(str, self.bits))} bits")
            trusted = describe_factory(self.model.router)["class_path"]  # the recipe names it
            device = self.trainer.strategy.root_device
            elastic = load(root / f"calibrated-at-{name}", dtype=full.dtype, device=device, trust_router=trusted)
            if rounded is None:
                linear = next(m for m in elastic.modules() if isinstance(m, ElasticLinear))
                rounded, _ = wrap_for_rounding(full, self.model.layout, linear.group_size, linear.slice_bits)
                records[NONE] = read_uniformly(full, rounded, full, rounded, batches, self.bits)
            watched = InputErrors(full, elastic, self.bits) if name == ALL else None
            inputs = routed_inputs(elastic)
            records[name] = read_uniformly(full, rounded, elastic, inputs, batches, self.bits, watched)
        return {**{name: records[name] for name in (*map(str, self.bits), ALL)}, NONE: records[NONE]}

    def _log(self, found: dict[str, Any]) -> None:
        metrics = overlap_metrics(found["tokens"]["elastic"])
        for row in found["matrix"]["rows"]:
            where = f"calibrated_at_{row['calibrated_at']}/used_at_{row['used_at']}"
            metrics |= {f"outliers/ppl/{where}": row["perplexity"], f"outliers/kl/{where}": row["kl"]}
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=0)
            logger.finalize("success")
