"""How the keys of a recipe are parsed: defaults of the trainer, and errors in a few lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from mobiq_lightning.console import MODULE
from mobiq_lightning.errors import RecipeError, shown
from mobiq_lightning.jobs.trainer_values import MAX_EPOCHS

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs/elastic",
    "devices": 1,
    "max_epochs": MAX_EPOCHS,  # LayerwiseCalibration sets it to blocks times epochs per block
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the data module shares windows out among ranks itself
}
"""Settings of the trainer where a recipe says nothing."""


_LONGEST = 300
"""Characters of the parser's own words that are shown."""


class RecipeParser(LightningArgumentParser):
    """Says what is wrong in a few lines instead of a page of usage, and takes no abbreviated keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Turns whatever the parser finds into a `RecipeError`."""
        if "are required" in message:
            message += ". Give a recipe, as in --config recipes/tiny.yaml"
        raise RecipeError(in_a_line(message)) from ex


def in_a_line(message: str) -> str:
    """What the parser says of a key over several lines, as one line that begins with the key: what is there, what is expected."""
    key = "".join(f"{name}: " for name in re.findall(r'Parser key "([^"]+)":', message)[:1])
    if missing := re.search(r"No module named '([\w.]+)'", message):
        return (
            f"{key}no module {missing[1]!r} is on the Python path. Run `{MODULE}` from the folder of its file, or put that "
            "folder into PYTHONPATH"
        )
    body = re.sub(r'Parser key "[^"]+":', "", message)
    body = re.sub(r"Expected a path but .* either not accessible or invalid", "", body)
    parts = [part for part in (line.strip(" -") for line in body.splitlines()) if part]
    if plain := _plain(parts):
        return key + plain
    text = " ".join(part if part.endswith((":", ".", ",")) else f"{part};" for part in parts).rstrip("; ")
    return key + (text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "list": "a list",
    "dict": "a mapping",
    "collections.abc.Iterable": "a list",
}
"""Types as the parser names them, in words."""


def _plain(parts: Sequence[str]) -> str:
    """What is wrong in the words of this package; empty for what is none of the usual mistakes.

    Args:
        parts: What the parser says, line by line, without the key.
    """
    for part in parts:  # the innermost key of a structure tells more than the structure
        inner = re.match(r"(\w+): ((?:Does not validate|Expected |Option ).*)", part)
        if inner and (found := _plain(re.split(r"; (?:Errors: )?", inner[2]))):
            return f"{inner[1]}: {found}"
    if said := next((part for part in parts if re.match(r"\w+: .*(is expected|no such argument)$", part)), ""):
        return said  # of an inner key, which went through here before
    text = "\n".join(parts)
    if option := re.search(r"Option '(\w+)' is not accepted", text):
        return f"{option[1]}: no such argument"
    value = re.search(r"(?:Given|Got) value: (.*?)\.?$", text, re.MULTILINE)
    named = re.search(r"'class_path': '([^']+)'|class_path='([^']+)'", value[1]) if value else None
    given = shown(next(n for n in named.groups() if n)) if named else value[1][:60] if value else ""
    if made := re.search(r"\.(\w+)\] expects a function or a callable class", text):
        return f"{given} makes no {made[1]}; give a class that does, by its name or dotted path"
    if path := re.search(r"Expected a dot import path string: (.*)", text):
        return f"{path[1]!r} names no class; give its dotted path"
    if re.search(r"Not a valid subclass|to be a subclass", text):
        return ""
    if "Subtypes: [<class" in text and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", given):
        return f"{given} cannot be imported, or is no class for this key"
    kinds = [_WORDS.get(name) for name in re.findall(r"Expected an? <class '([\w.]+)'>", text) if name != "NoneType"]
    literals = re.findall(r"Expected a typing\.Literal\[([^\]]*)\]", text)
    words = [word.strip(" '") for literal in literals for word in literal.split(",")]
    if None in kinds or not (kinds or words):
        return ""
    expected = [kind for kind in dict.fromkeys(kinds) if kind] + ([f"one of {', '.join(words)}"] if words else [])
    return f"{given}; {' or '.join(expected)} is expected"


def with_whole_stages(arguments: Sequence[str]) -> list[str]:
    """Arguments under which stages replace those that were given before; as many of them would be merged, key by key."""
    found: list[str] = []
    for argument in arguments:
        if argument == "--model.stages" or argument.startswith("--model.stages="):
            found.append("--model.stages=null")
        found.append(argument)
    return found
