"""What a run tells of its routers and blocks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mobiq_lightning.callbacks import RoutingDiagnostics
from mobiq_lightning.cli import main
from mobiq_lightning.errors import RecipeError
from mobiq_lightning.evaluation import BlockErrors, use_by_frequency, use_by_position
from mobiq_lightning.evaluation.routing_use import RoutingUse
from mobiq_lightning.nn import fixed_depth, routed_inputs
from mobiq_lightning.runs import ClassUse, RunFolder
from mobiq_lightning.sources import load_source
from mobiq_lightning.strategies.objectives.block_reconstruction import relative_error
from tests.conftest import Run


def test_depths_are_counted_per_input_without_padding() -> None:
    use = RoutingUse([3, 1], [2, 4, 8], 10)
    mask = torch.tensor([[True, True, False]])
    use.update([torch.tensor([[2.0, 4.0, 8.0]]), torch.tensor([[8.0, 8.0, 2.0]])], torch.tensor([[5, 6, 7]]), mask)
    use.update([torch.tensor([[2.0]]), torch.tensor([[4.0]])], torch.tensor([[5]]), torch.tensor([[True]]))
    assert use.compute()["read"].tolist() == [[2, 1, 0], [0, 1, 2]]


def test_positions_are_classes_that_double_and_inputs_weigh_by_their_weights() -> None:
    use = RoutingUse([3, 1], [2, 6], 10)
    bits = torch.full((1, 9), 2.0)
    bits[0, 4:8] = 6.0
    use.update(
        [bits, torch.full((1, 9), 2.0)], torch.zeros(1, 9, dtype=torch.int64), torch.ones(1, 9, dtype=torch.bool)
    )
    found = use_by_position(use.compute())
    assert [(c.name, c.tokens) for c in found] == [
        ("0", 1),
        ("1", 1),
        ("2", 1),
        ("3", 1),
        ("4-7", 4),
        ("8-15", 1),
    ]
    assert [c.bits for c in found] == [2, 2, 2, 2, (3 * 6 + 2) / 4, 2]


def test_tokens_are_put_into_classes_by_how_often_the_text_has_them() -> None:
    use = RoutingUse([1], [2, 4, 8], 10)
    ids = torch.tensor([[7, 7, 7, 4, 4, 9]])  # 7 three times, 4 twice, 9 once
    use.update([torch.tensor([[8.0, 8.0, 8.0, 4.0, 4.0, 2.0]])], ids, torch.ones(1, 6, dtype=torch.bool))
    found = use_by_frequency(use.compute())
    assert found == [ClassUse("1", 1, 2.0), ClassUse("2-3", 5, 32 / 5)]


def test_a_blocks_error_is_that_of_the_block_alone_on_the_full_precision_input(finished: Run, model: Any) -> None:
    source = load_source(str(Path(_argument(finished[1], "--model.pretrained"))), "auto").model
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:] = False
    metric = BlockErrors(list(source.model.layers), list(model.model.layers), [2, 8])
    with torch.no_grad():
        metric.update(source, ids, mask)
        hidden = source(input_ids=ids, output_hidden_states=True).hidden_states
        positions = source.model.rotary_emb(hidden[1], torch.arange(12)[None])
        block = model.model.layers[0]  # the second block's input is the first one's output
        with fixed_depth(routed_inputs(block), 2):
            output = block(hidden[0], position_embeddings=positions)
    errors, tokens = metric.compute()
    assert int(tokens) == 19
    assert float(errors[0, 0]) == pytest.approx(float(relative_error(output[mask], hidden[1][mask])), rel=1e-4)
    assert (errors[:, 1] < 0.01 * errors[:, 0]).all()


def test_every_run_writes_diagnostics_that_agree_with_its_results(finished: Run) -> None:
    found = json.loads((finished[0] / "diagnostics.json").read_text())
    rows = json.loads((finished[0] / "results.json").read_text())["rows"]
    assert len(found["inputs"]) == 8
    assert found["inputs"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert found["depths"] == [2, 3, 4, 6, 8]
    weights = torch.tensor([entry["weights"] for entry in found["inputs"]], dtype=torch.float64)
    used = {row["target_bits"]: row["used_bits"] for row in rows if row["allocation"] == "router"}
    assert [budget["target_bits"] for budget in found["budgets"]] == sorted(used)
    for budget in found["budgets"]:
        means = torch.tensor(budget["mean_bits"], dtype=torch.float64)
        assert float((means * weights).sum() / weights.sum()) == pytest.approx(used[budget["target_bits"]])
        assert torch.tensor(budget["depth_share"]).sum(1).tolist() == pytest.approx([1.0] * 8)
        for classes in (budget["by_position"], budget["by_frequency"]):
            tokens = sum(entry["tokens"] for entry in classes)
            mean = sum(entry["tokens"] * entry["bits"] for entry in classes) / tokens
            assert mean == pytest.approx(used[budget["target_bits"]])
    errors = torch.tensor(found["block_error"]["relative_error"])
    assert errors.shape == (2, 5)
    assert (errors.diff(dim=1) < 0).all()


def test_damaged_ones_are_written_anew_and_overwrite_removes_them(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished[0], tmp_path / "run")
    (run / "diagnostics.json").write_text("{}")
    arguments = [a for a in finished[1] if not a.startswith("--trainer.default_root_dir")]
    validate = ["validate", *arguments, f"--trainer.default_root_dir={run}", "--model.eval_bits=[3]"]
    assert main(validate) == 0
    assert "diagnostics.json: inputs is missing" in (said := capsys.readouterr().err)
    assert "It is written anew, with the budgets of this comparison alone." in said
    found = json.loads((run / "diagnostics.json").read_text())
    assert [budget["target_bits"] for budget in found["budgets"]] == [3]
    folder = RunFolder(run)
    folder.claim({"trainer": {"callbacks": None}}, overwrite=True)
    folder.begin()
    assert not (run / "diagnostics.json").exists()


def test_no_batch_for_the_errors_is_refused() -> None:
    with pytest.raises(RecipeError, match="error_batches \\(0\\) must be at least 1"):
        RoutingDiagnostics(error_batches=0)


def _argument(arguments: list[str], key: str) -> str:
    return next(a.split("=", 1)[1] for a in arguments if a.startswith(f"{key}="))
