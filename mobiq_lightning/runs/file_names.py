"""Names of all files and folders in a run folder and in a checkpoint, each with who writes it."""

from __future__ import annotations

# ------------------------------------------------------------------ run folder

RUN_CONFIG = "config.yaml"
"""The recipe of the run, every key of it; written by `RunFolder.claim` before anything else."""
IDENTITY = "identity.json"
"""Hashes of model and text that the run was started with; written by `check_identity`."""
RETRIES = "retries.json"
"""How often each block was started anew; written by `Retries.note`."""
CHECKPOINTS = "checkpoints"
"""Folder of the training checkpoints, from which a run goes on; written by Lightning's `ModelCheckpoint`."""
BLOCKS = "blocks"
"""Folder of what processes leave that calibrate single blocks of the run; written by `fit --blocks`."""
HIDDEN_STATES = "hidden_states"
"""Folder of the hidden states that do not fit in memory, one folder per rank; written by the calibration."""
GENERATED = "generated_text"
"""Folder of the calibration windows that the model wrote itself; written by the calibration."""
JOURNAL = "metrics.jsonl"
"""Every logged metric as a line; written by `JsonlLogger`."""
CSV_LOG = "csv"
"""Folder of the metrics as CSV; written by Lightning's `CSVLogger`."""
WANDB = "wandb"
"""Folder of an offline run of Weights & Biases; written by `WandbLogger`."""
LAYER_GAINS = "layer_gains.json"
"""What slices gain the whole model; written by the callback `LayerGains`."""
LAYER_GAINS_SO_FAR = "layer_gains.partial"
"""Folder of what is known of that while it is measured, a file for each rank and method; written by `LayerGains`."""
ELASTIC = "elastic"
"""Folder of the checkpoint; written by the callback `BlockExport`."""
PARTIAL_SUFFIX = ".partial"
"""What the name of a checkpoint's folder ends with until it is whole."""
PARTIAL = f"{ELASTIC}{PARTIAL_SUFFIX}"
"""Folder of the checkpoint until it is whole; written by the callback `BlockExport`."""
RESULTS = "results.json"
"""What the comparison has measured, also in the checkpoint; written by the callback `Results`, `evaluate` adds to it."""
RESULTS_TABLE = "results.csv"
"""The rows of the comparison as a table; written by the callback `Results`."""
RESULTS_PLOT = "results.png"
"""Perplexity against used bits; written by the callback `Results`."""
DIAGNOSTICS = "diagnostics.json"
"""What routers do and how good blocks are; written by the callback `RoutingDiagnostics`."""
OTHER_PROTOCOLS = "other_protocols"
"""Folder of what `validate` measured on another text or in another way, a folder each, with the names of the files above."""
OUTLIERS = "outliers.json"
"""Which tokens suffer most at each precision; written by the callback `OutlierMigration` and by `outliers`."""
OUTLIERS_TABLE = "outliers.csv"
"""Every token of that study as a line; written with it."""
OUTLIERS_PLOT = "outliers.png"
"""The plot of that study; written with it."""
LOCK = ".lock"
"""File whose lock the process holds that works in a folder; `RunFolder.lock` makes it, and removes it at the end."""

COMPARING = ".comparing"
"""Is there while the comparison at the end of a run is not written completely; written and removed by `fit`."""
ASIDE = ".overwritten"
"""Folder of the run that `--overwrite` replaces, until the new one has begun; written by `RunFolder.claim`."""

RUN_FILES = (
    RUN_CONFIG,
    COMPARING,
    IDENTITY,
    RETRIES,
    CHECKPOINTS,
    BLOCKS,
    HIDDEN_STATES,
    GENERATED,
    JOURNAL,
    CSV_LOG,
    WANDB,
    LAYER_GAINS,
    LAYER_GAINS_SO_FAR,
    ELASTIC,
    PARTIAL,
    RESULTS,
    RESULTS_TABLE,
    RESULTS_PLOT,
    DIAGNOSTICS,
    OTHER_PROTOCOLS,
    OUTLIERS,
    OUTLIERS_TABLE,
    OUTLIERS_PLOT,
)
"""All that a run writes into its folder, and that starting it anew removes from there."""
RUN_FOLDERS = (
    CHECKPOINTS,
    BLOCKS,
    HIDDEN_STATES,
    GENERATED,
    CSV_LOG,
    WANDB,
    LAYER_GAINS_SO_FAR,
    ELASTIC,
    PARTIAL,
    OTHER_PROTOCOLS,
)
"""Those of them that are folders; all others are files."""

# ------------------------------------------------------------------ checkpoint

CONFIG = "config.json"
"""Config of transformers, with `quantization_config`; written when all blocks are done."""
INDEX = "model.safetensors.index.json"
"""Which tensor is in which shard; written with the tensors."""
HASHES = "hashes.json"
"""Hashes of the files, which `verify` checks; written last."""
PROVENANCE = "provenance.json"
"""Where the checkpoint comes from; written with the tensors."""
RECIPE = "recipe.yaml"
"""The recipe that made it; written with the tensors."""
SPEED = "speed.json"
"""How fast it decodes on one machine; written by `store_speed`."""
CARD = "README.md"
"""The model card; written anew whenever results change."""

LATER = (RESULTS, SPEED, CARD, HASHES)
"""Files that are written, or written anew, after the tensors; hashes.json does not hold theirs."""

COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Patterns of the files that are copied from the source model unchanged."""


def shard_name(index: int, count: int) -> str:
    """Name of a file of tensors.

    Args:
        index: Number of the shard, from 0.
        count: Shards in all.
    """
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"
