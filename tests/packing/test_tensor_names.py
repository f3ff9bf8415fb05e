"""Names of stored tensors: what is written is spelled out here, letter by letter, since checkpoints exist that have it."""

from __future__ import annotations

import re

import pytest

from mobiq_lightning.nn import ElasticLinear, RoutedInput
from mobiq_lightning.packing import CODES, TensorKind, carrier_of, deeper_than, input_tensor_name, kind_of, plane_of
from mobiq_lightning.strategies import MLPRouter
from mobiq_lightning.strategies.transform_base import StoredTransform

L = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "kind", "plane"),
    [
        (f"{L}.plane_0", "plane", 0),
        (f"{L}.plane_7", "plane", 7),
        ("plane_3", "plane", 3),
        (f"{L}.slice_scale", "scale", None),
        (f"{L}.slice_scale_5", "scale", 5),
        (f"{L}.slice_bias", "bias", None),
        (f"{L}.slice_bias_1", "bias", 1),
        (f"{L}.slice_table_2", "table", 2),
        (f"{L}.bias", "other", None),
        (f"{L}.input.router.score.weight", "router", None),
        (f"{L}.input.router.plane_7", "router", None),
        (f"{L}.input.transform.scale", "transform", None),
        (f"{L}.input.layer_thresholds", "thresholds", None),
        (f"{L}.input.global_thresholds", "thresholds", None),
        (f"{L}.input.budgets", "budgets", None),
        ("model.layers.0.airplane_3", "other", None),
        ("model.embed_tokens.weight", "other", None),
    ],
)
def test_a_name_says_what_a_tensor_is_and_which_plane_it_needs(name: str, kind: str, plane: int | None) -> None:
    assert kind_of(name) == kind
    assert plane_of(name) == plane


def carrier(code: str) -> ElasticLinear:
    linear = ElasticLinear(20, 4, (2, 1, 1), 8, bias=True, code=code)
    routed = RoutedInput(MLPRouter(20, 3), (2, 1, 1), 80, transform=StoredTransform(20, ["scale", "shift"]))
    linear.attach(routed, carries_input=True)
    return linear


VALUES = {
    "nested": ["slice_scale", "slice_bias"],
    "per_slice": [f"slice_{kind}_{last}" for last in (1, 2, 3) for kind in ("scale", "bias")],
    "per_plane": ["slice_bias", "slice_scale_0", "slice_scale_1", "slice_scale_2", "slice_scale_3"],
    "codebook": ["slice_table_1", "slice_table_2", "slice_table_3"],
}


@pytest.mark.parametrize("code", CODES)
def test_a_linear_stores_its_tensors_under_these_names_and_each_is_known(code: str) -> None:
    names = list(carrier(code).state_dict())
    own = ["bias", *(f"plane_{p}" for p in range(4)), *VALUES[code]]
    of_input = [
        *("input.budgets", "input.layer_thresholds", "input.global_thresholds"),
        *(f"input.router.{name}" for name in MLPRouter(20, 3).state_dict()),
        *("input.transform.scale", "input.transform.shift"),
    ]
    assert sorted(names) == sorted(own + of_input)
    expected: dict[str, set[TensorKind]] = {"nested": {"scale", "bias"}, "per_slice": {"scale", "bias"}}
    expected |= {"per_plane": {"scale", "bias"}, "codebook": {"table"}}
    kinds = {kind_of(f"{L}.{name}") for name in names}
    assert kinds == {"plane", "router", "transform", "thresholds", "budgets", "other"} | expected[code]
    assert [name for name in names if kind_of(f"{L}.{name}") == "other"] == ["bias"]


@pytest.mark.parametrize("code", CODES)
def test_the_names_that_a_part_leaves_in_the_file_are_those_that_need_deeper_planes(code: str) -> None:
    names = [f"{L}.{name}" for name in carrier(code).state_dict()]
    for held in (2, 3):
        left = [name for name in names if re.search(deeper_than(held), name)]
        assert left == [name for name in names if (plane_of(name) or 0) >= held]
        assert left


def test_the_linear_that_carries_an_input_is_read_from_the_names_of_the_inputs_tensors() -> None:
    assert carrier_of(input_tensor_name(L, "router.weight")) == L
    with pytest.raises(ValueError, match=r"plane_0 is no tensor of a routed input"):
        carrier_of(f"{L}.plane_0")
