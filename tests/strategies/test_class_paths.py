"""How checkpoints name plug-in classes."""

from __future__ import annotations

import functools
import importlib

import pytest

from mobiq_lightning import strategies
from mobiq_lightning.strategies import HadamardRotation, MLPRouter, Router, Transform
from mobiq_lightning.strategies.class_paths import describe_class, describe_factory, public_path

EXPORTED = [c for c in vars(strategies).values() if isinstance(c, type) and issubclass(c, (Router, Transform))]


class OwnRouter(MLPRouter):
    """A router of somebody else's module."""


@pytest.mark.parametrize("cls", EXPORTED, ids=lambda cls: cls.__name__)
def test_a_class_of_ours_is_named_by_the_package_that_exports_it(cls: type) -> None:
    path = public_path(cls)
    assert path == f"mobiq_lightning.strategies.{cls.__name__}"
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is cls


def test_another_class_is_named_by_its_own_module_even_if_its_name_is_one_of_ours() -> None:
    assert public_path(OwnRouter) == f"{__name__}.OwnRouter"
    renamed = type("MLPRouter", (MLPRouter,), {"__module__": "somebody.elses"})
    assert public_path(renamed) == "somebody.elses.MLPRouter"


def test_factories_and_transforms_are_described_alike() -> None:
    wanted = {"class_path": "mobiq_lightning.strategies.MLPRouter", "init_args": {"hidden_features": 4}}
    assert describe_class(MLPRouter, {"hidden_features": 4}) == wanted
    assert describe_factory(functools.partial(MLPRouter, hidden_features=4)) == wanted
    by_recipe = functools.partial(lambda make, cls, *args, **kw: cls(*args, **kw), print, MLPRouter, hidden_features=4)
    assert describe_factory(by_recipe) == wanted, "as jsonargparse binds the class"
    assert describe_factory(MLPRouter) == {**wanted, "init_args": {}}
    assert HadamardRotation(seed=3).describe() == {
        "class_path": "mobiq_lightning.strategies.HadamardRotation",
        "init_args": {"seed": 3},
    }


def test_a_factory_whose_arguments_cannot_be_written_down_is_refused() -> None:
    with pytest.raises(TypeError, match=r"give a class, or a functools\.partial of one"):
        describe_factory(lambda in_features, n_slices: MLPRouter(in_features, n_slices))
