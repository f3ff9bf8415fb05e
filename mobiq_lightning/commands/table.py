"""All commands, in the order in which the help lists them."""

from __future__ import annotations

from mobiq_lightning.commands.check import Check
from mobiq_lightning.commands.command import Command
from mobiq_lightning.commands.compare import Compare
from mobiq_lightning.commands.evaluate import Evaluate
from mobiq_lightning.commands.export import Export
from mobiq_lightning.commands.fit import Fit
from mobiq_lightning.commands.generate import Generate
from mobiq_lightning.commands.inspect import Inspect
from mobiq_lightning.commands.latency import Latency
from mobiq_lightning.commands.outliers import Outliers
from mobiq_lightning.commands.recipes import Recipes
from mobiq_lightning.commands.validate import Validate
from mobiq_lightning.commands.verify import Verify

_ALL: tuple[Command, ...] = (
    Check(),
    Fit(),
    Validate(),
    Generate(),
    Export(),
    Inspect(),
    Verify(),
    Evaluate(),
    Compare(),
    Outliers(),
    Latency(),
    Recipes(),
)
COMMANDS: dict[str, Command] = {command.name: command for command in _ALL}
"""Commands by name."""
