"""Names of the files of an elastic checkpoint."""

from __future__ import annotations

ELASTIC = "elastic"
"""Folder of the checkpoint in its run folder."""

CONFIG, INDEX, HASHES = "config.json", "model.safetensors.index.json", "hashes.json"
PROVENANCE, RECIPE, RESULTS, SPEED, CARD = "provenance.json", "recipe.yaml", "results.json", "speed.json", "README.md"

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
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Patterns of the files that are copied from the source model unchanged."""


def shard_name(index: int, count: int) -> str:
    """Of shard `index`, from 0, of `count`."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"
