"""What ``fit`` and ``validate`` are made of: LightningCLI with our defaults, run folders, resume and retries."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from mobiq_lightning.calibration import (
    ElasticCalibration,
    SafeCheckpointIO,
    can_be_read,
    check_one_process,
    check_strategy,
    finish_checkpoint,
)
from mobiq_lightning.callbacks.cut_short import check_fit_is_whole
from mobiq_lightning.console import is_first_process, program, say
from mobiq_lightning.errors import MobiqError, NonFiniteError, RecipeError, RunFolderError
from mobiq_lightning.evaluation import print_table
from mobiq_lightning.jobs.damaged_run import carry_over, must_be_rebuilt, results_fit
from mobiq_lightning.jobs.device_memory import out_of_memory
from mobiq_lightning.jobs.lost_process import lost_process
from mobiq_lightning.jobs.parsing import TRAINER_DEFAULTS, RecipeParser, with_whole_stages
from mobiq_lightning.jobs.run_parts import callbacks_of_run, loggers_of_run
from mobiq_lightning.jobs.trainer_checks import check_trainer, trainer_errors
from mobiq_lightning.jobs.workplace import Workplace
from mobiq_lightning.latency import print_budgets
from mobiq_lightning.runs import (
    CONFIG,
    ELASTIC,
    RESULTS,
    SPEED,
    RunFolder,
    check_results,
    read_results,
    without_places,
)
from mobiq_lightning.sources import TextWindows

_OF_A_COMPARISON = (
    "model.eval_bits:",
    "model.random_seeds:",
    "model.threshold_scope:",
    "model.dtype:",
    "data.eval_",
    "seed_everything:",
    "trainer.",
)
"""How lines of keys begin that a comparison of a finished run may be given with other values."""
Command: TypeAlias = Literal["fit", "validate", "build"]

MAX_RETRIES = 2
RETRY_FACTOR = 0.2
"""What a block's learning rates are multiplied with each time it is started anew."""


class ElasticCLI(LightningCLI):
    """Parses the command line of a job, claims its run folder and builds model, data and trainer; `run` does the work.

    Args:
        command: ``fit`` makes the run folder this recipe's, ``validate`` wants a finished run in it, ``build`` leaves it alone.
        arguments: What follows the command.
        blocks: The blocks, by index from 0, that a ``fit`` is to calibrate, and nothing else; None: all, and what follows.

    Raises:
        RecipeError: If a key or value cannot be used.
        RunFolderError: If the run folder holds something else than what the command needs.
    """

    datamodule: TextWindows
    model: ElasticCalibration
    trainer: Trainer
    own_keys: ClassVar[tuple[str, ...]] = ("overwrite", "config")
    """Keys of the command line that are no part of the recipe."""

    def __init__(self, command: Command, arguments: Sequence[str], blocks: range | None = None) -> None:
        self.command, self.blocks = command, blocks
        self._random_state = torch.empty(0)
        self.run_folder = RunFolder(".")
        self.resumes = False
        self.recipe: dict[str, Any] = {}
        try:
            self._build(arguments)
        except BaseException:
            self.run_folder.release()
            raise

    def _build(self, arguments: Sequence[str]) -> None:
        super().__init__(
            ElasticCalibration,
            TextWindows,
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_class=RecipeParser,
            parser_kwargs={"prog": f"{program()} {self.command}"},
            args=with_whole_stages(arguments),
            run=False,  # the command is no part of what is parsed: one recipe fits all, and a run resumes by itself
        )

    def run(self) -> RunFolder:
        """Calibrates, or compares again.

        Returns:
            The run folder, finished.
        """
        jobs: dict[str, Callable[[], None]] = {"fit": self.fit, "validate": self.validate}
        try:
            kept = self.how_it_goes_on
            with trainer_errors(), lost_process(self.trainer, kept), out_of_memory(kept):
                jobs[self.command]()
        except OSError:
            self.run_folder.check_in_place()
            raise
        finally:
            self.run_folder.release()
        return self.run_folder

    def how_it_goes_on(self) -> str:
        """What a user is told whose job has ended before its time: what is kept, and what the same command does."""
        kept = self.workplace.training.epochs_kept
        if self.blocks is not None:
            return "blocks that are finished are kept, and epochs of the one in work; the same command goes on"
        if self.command == "validate":
            return "the checkpoint is as it was; the same command compares again"
        if self.run_folder.finished:
            return "the results are written; the same command shows them"
        if not kept:
            return "no epoch was finished; the same command starts the run"
        epochs = "1 finished epoch is" if kept == 1 else f"{kept} finished epochs are"
        without = " without --overwrite" if self.overwrites else ""
        return f"{epochs} kept; the same command{without} goes on after {'it' if kept == 1 else 'them'}"

    @property
    def overwrites(self) -> bool:
        """Whether the run that the folder holds is to be removed."""
        return bool(self._get(self.config, "overwrite"))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the one key that is no part of a recipe."""
        parser.add_argument("--overwrite", action="store_true", help="Remove the run that the run folder holds.")

    def before_instantiate_classes(self) -> None:
        """Claims the run folder before anything is built."""
        self.expand_run_folder()
        self._dump_config()
        recipe = {k: v for k, v in self.config_dump.items() if k not in self.own_keys}
        self.recipe = json.loads(json.dumps(recipe))
        check_trainer(self.recipe["trainer"])
        self.run_folder = RunFolder(self.recipe["trainer"]["default_root_dir"])
        overwrite = self.overwrites
        if self.command == "validate" and not (self.run_folder.checkpoint / CONFIG).is_file():
            raise RunFolderError(
                f"{self.run_folder.path} holds no finished run (no {ELASTIC}/{CONFIG}). Run `fit` with this recipe "
                "first, or give the run's folder as --trainer.default_root_dir"
            )
        if not is_first_process():
            self.resumes = not overwrite  # the first process locks the folder and claims it for all
        elif self.blocks is not None:
            self.run_folder.claim_blocks(self.recipe, self.blocks)
        elif self.command != "build":
            self.run_folder.lock()
            if self.command == "validate":
                check_results(self.run_folder.path)  # they are added to at the end; damage is said now
                self._say_what_is_without_effect()
            if self.command == "fit":
                self.resumes = self.run_folder.claim(self.recipe, overwrite)

    @property
    def workplace(self) -> Workplace:
        """What this process goes on from."""
        return Workplace(self.run_folder, self.blocks)

    def _say_what_is_without_effect(self) -> None:
        """Names keys of the calibration that a comparison of the finished checkpoint was given with other values."""
        differences = self.run_folder.differences(self.recipe)
        if idle := [line for line in differences if not line.startswith(_OF_A_COMPARISON)]:
            say("validate compares the checkpoint as it is; without effect:\n  " + "\n  ".join(idle))

    def expand_run_folder(self) -> None:
        """Puts environment variables into the run folder's name: in a sweep, $WANDB_RUN_ID tells runs apart.

        Raises:
            RecipeError: If one of them is not set.
        """
        trainer = self._get(self.config, "trainer")
        folder = os.path.expandvars(str(trainer.default_root_dir or ""))
        if "$" in folder:
            raise RecipeError(f"trainer.default_root_dir: {folder} names an environment variable that is not set")
        trainer.default_root_dir = folder

    def instantiate_classes(self) -> None:
        """Builds model, data and trainer; again for a block that starts anew, as in a process of its own."""
        if len(self._random_state):
            torch.set_rng_state(self._random_state)
        self._random_state = torch.get_rng_state()
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:  # raised by the constructor of a plug-in
            raise RecipeError(str(error)) from error
        if self.command == "fit" and self.model.block_inputs == "full":
            self.model.share = self.workplace.share(self.recipe)
        for block, n in self.workplace.retries.counts().items():
            self.model.record.lower_rates(block, RETRY_FACTOR**n)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the callbacks, loggers and checkpoint writer that every run has."""
        config = self._get(self.config_init, "trainer")
        bar = config.get("enable_progress_bar") is not False
        config["callbacks"] = callbacks_of_run(config.get("callbacks") or [], self.run_folder, bar, self.blocks)
        config["logger"] = loggers_of_run(config.get("logger"), self.workplace.folder, self.config_dump)
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        config["plugins"] = [*plugins, SafeCheckpointIO(self.run_folder.check_in_place)]
        with trainer_errors(building=True):
            trainer = super().instantiate_trainer(**kwargs)
        check_strategy(trainer.strategy)
        check_one_process(self.model.block_inputs, trainer.world_size)
        return trainer

    def fit(self) -> None:
        """Calibrates, or goes on calibrating; then exports and compares, unless blocks alone are asked for."""
        if self.blocks is not None:
            self._fit_blocks(self.blocks)
            return
        finished = self.resumes and self.run_folder.finished
        if finished and not must_be_rebuilt(self.run_folder):
            self._show_results()
            return
        self._fit_to_end()
        self._export()
        self.trainer.strategy.barrier()  # the other ranks load what the first one has written
        if finished and results_fit(self.run_folder):
            self._show_results()
        else:
            with self.run_folder.comparing():
                self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)

        self.run_folder.blocks.clear()

    def _fit_blocks(self, blocks: range) -> None:
        """Calibrates some blocks, those that are not calibrated yet, and leaves them in the run folder."""
        if self.run_folder.finished:
            say(f"{self.run_folder.path} holds this run, finished: its blocks are no longer needed.")
            return
        for again in (False, True):
            if again and not self.workplace.is_done(
                blocks
            ):  # the file of a block was lost that checkpoints were behind
                self.instantiate_classes()
            if not self.workplace.is_done(blocks):
                self._fit_to_end()
            self.run_folder.blocks.drop_training(blocks)
        say(self.workplace.said_at_end(blocks))

    def _fit_to_end(self) -> None:
        """Calibrates to the end of what this process is to do; starts blocks anew that fail."""
        while True:
            try:
                self.trainer.fit(
                    self.model, datamodule=self.datamodule, ckpt_path=self._newest_checkpoint(), weights_only=True
                )
                break
            except NonFiniteError as error:
                self._prepare_retry(error)
        check_fit_is_whole(self.trainer, self.model)
        self.run_folder.check_in_place()

    def _show_results(self) -> None:
        """Shows what a finished run has measured."""
        say(
            f"{self.run_folder.path} holds this run, finished; --overwrite starts it again, `validate` compares it again."
        )
        results = read_results(self.run_folder.path / RESULTS)
        if results.measured is not None:
            print_table(results.measured)
        if results.latency is not None:
            print_budgets(results.latency)

    def validate(self) -> None:
        """Compares the run's checkpoint again; what is measured again replaces itself in its results, all else stays."""
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)

    def _newest_checkpoint(self) -> Path | None:
        checkpoint, damaged = self.workplace.training.newest(can_be_read)
        for path in damaged:
            say(f"{path.name} is damaged, was not finished, or is not safe to load; it is not used.")
            self.workplace.training.remove(path)
        if checkpoint is not None:
            say(f"Resuming from {checkpoint.name} in {self.run_folder.path}.")
        return checkpoint

    def _prepare_retry(self, error: NonFiniteError) -> None:
        """Goes back to the start of the block that failed, with lower learning rates and in float32.

        Raises:
            MobiqError: If the block has failed before, too often.
        """
        if self.trainer.world_size > 1:
            raise MobiqError(
                f"{error}\nFinished blocks are kept. One process would try again at lower rates; several cannot. Lower "
                "model.rates (ranges, codes, routers) and start again with --overwrite, or start on one device"
            ) from error
        retry = self.workplace.retries.note(error.block)
        place = "the whole model" if error.block is None else f"block {error.block + 1}"
        if retry > MAX_RETRIES:
            raise MobiqError(
                f"{error}\nThis was try {retry} of {place}, at {RETRY_FACTOR ** (retry - 1):g} of the learning rates. "
                "Finished blocks are kept. Lower model.rates (ranges, codes, routers), or look at the "
                "weights there; then start again with --overwrite"
            ) from error
        place = place[0].upper() + place[1:]
        precision = "" if error.block is None else ", in float32"
        say(f"{error}\n{place} starts anew at {RETRY_FACTOR**retry:g} of the learning rates{precision}.")
        self.workplace.training.drop_after(self.model.segment.visit.start)
        self.instantiate_classes()

    @rank_zero_only
    def _export(self) -> None:
        folder = self.run_folder.path / ELASTIC
        rebuilt = self.run_folder.finished
        speed = self.run_folder.checkpoint / SPEED
        measured = speed.read_bytes() if rebuilt and speed.is_file() else None
        damaged = finish_checkpoint(self.model, yaml.safe_dump(without_places(self.config_dump), sort_keys=False))
        for block in damaged:
            say(f"The shard of block {block + 1} was damaged since it was written; it is written again.")
        if rebuilt:
            carry_over(self.run_folder, measured)
        say(f"Elastic checkpoint written to {folder}.")
