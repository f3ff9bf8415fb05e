"""The parts of a calibration: what is registered, what DDP must leave alone, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn

from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.calibration.fit_checks import check_plugins
from mobiq_lightning.calibration.schedule import Stage
from mobiq_lightning.calibration.sliced_source import SlicedSource
from mobiq_lightning.calibration.text_of_run import text_of
from mobiq_lightning.callbacks import Guards, LatencyCheck, LayerGains, LayerwiseCalibration, OutlierMigration, Results
from mobiq_lightning.callbacks.guards import guards_of
from mobiq_lightning.errors import DataError, RecipeError
from mobiq_lightning.nn import BlockLayout
from mobiq_lightning.sources import TextWindows, load_source
from mobiq_lightning.strategies import (
    BlockReconstruction,
    ConstantBudget,
    LearnableEquivalentTransform,
    LogitDistillation,
    MLPRouter,
    NoTransform,
    ProgressiveSlices,
    ResidualSlices,
)


class Holder(nn.Module):
    """As the LightningModule holds the parts."""

    def __init__(self, model: Path, slices: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.sliced = SlicedSource(
            load_source(str(model)),
            BlockLayout(),
            self.blocks,
            slices=partial(slices, group_size=16),
            router=MLPRouter,
            transform=NoTransform(),
            share_routers="input",
        )
        self.sliced.slice_blocks()
        self.sliced.make_caller(torch.device("cpu"), ())


def test_a_whole_model_that_was_on_a_device_has_the_very_tensors_of_the_host_again(
    make_model: Callable[..., Path],
) -> None:
    holder = Holder(make_model(), ResidualSlices)
    model, cpu = holder.sliced.source.model, torch.device("cpu")
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for leave in (holder.sliced.leave_device, lambda: holder.sliced.make_caller(cpu, ())):
        holder.sliced.caller.bring(1)
        holder.sliced.enter_device(torch.device("meta"))
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        leave()
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_a_module_registers_what_is_learned_and_never_the_source_model(make_model: Callable[..., Path]) -> None:
    holder = Holder(make_model(), ResidualSlices)
    assert {name.split(".")[0] for name, _ in holder.named_modules() if name} == {"blocks"}
    assert {name.split(".")[0] for name in holder.state_dict()} == {"blocks"}
    weights = {id(p) for p in holder.sliced.source.model.parameters()}
    assert not weights & {id(p) for p in holder.parameters()}


def test_tensors_whose_sizes_change_are_those_that_the_schemes_name(make_model: Callable[..., Path]) -> None:
    holder = Holder(make_model(), ProgressiveSlices)
    empty = {n for n, t in (*holder.named_parameters(), *holder.named_buffers()) if t.numel() == 0}
    assert {f"blocks.{name}" for name in holder.sliced.resized_tensors()} == empty
    assert len(empty) == 2 * 14  # two in each linear
    assert Holder(make_model(), ResidualSlices).sliced.resized_tensors() == []


def test_another_data_module_is_refused_and_not_ignored() -> None:
    def trainer(data: Any) -> Any:
        return SimpleNamespace(datamodule=data)

    with pytest.raises(DataError, match=r"LightningDataModule; .* takes a mobiq_lightning.sources.TextWindows"):
        text_of(trainer(LightningDataModule()))
    with pytest.raises(DataError, match="no data module"):
        text_of(trainer(None))
    assert isinstance(text_of(trainer(TextWindows())), TextWindows)


def test_a_callback_refuses_another_module() -> None:
    with pytest.raises(TypeError, match="Guards works on ElasticCalibration, not on LightningModule"):
        Guards().setup(Trainer(logger=False, accelerator="cpu"), LightningModule(), "fit")


def test_callbacks_run_in_an_order_that_they_say() -> None:
    kinds = [LatencyCheck, Results, LayerGains, OutlierMigration, Guards, LayerwiseCalibration]
    ordered = [LayerwiseCalibration, Guards, LayerGains, Results, OutlierMigration, LatencyCheck]
    assert sorted(kinds, key=lambda kind: kind.order) == ordered


def test_without_the_callback_nothing_is_guarded() -> None:
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    assert guards_of(trainer) is None
    trainer.callbacks.append(Guards())  # type: ignore[attr-defined]
    assert isinstance(guards_of(trainer), Guards)


def test_codes_are_not_trained_beside_transforms() -> None:
    def check(*trained: list[Any]) -> None:
        stages = [Stage(train=train, epochs=1, depth=2) for train in trained]
        objectives = (BlockReconstruction({2: 1.0}), LogitDistillation())
        check_plugins(
            ProgressiveSlices,
            MLPRouter,
            ConstantBudget(3.0),
            objectives,
            1,
            stages,
            [2],
            LearnableEquivalentTransform(),
        )

    with pytest.raises(RecipeError, match="where a stage trains codes, none trains transforms"):
        check(["ranges", "transforms"], ["codes"])
    check(["ranges"], ["codes"])
    check(["ranges", "transforms"], ["ranges"])


def test_rates_of_a_calibration_that_names_none_are_the_documented_ones() -> None:
    module = ElasticCalibration(
        "builtin", ResidualSlices, MLPRouter, ConstantBudget(3.0), BlockReconstruction({2: 1.0})
    )
    assert (module.rates.ranges, module.rates.codes) == (5e-3, 1e-3)
    assert (module.rates.transforms, module.rates.routers) == (5e-3, 1e-3)
    assert [stage.train for stage in module.stages] == [
        ["ranges", "transforms"],
        ["ranges", "transforms", "routers"],
    ]
