"""The table of cheaper training: costs are counted as they are, sums outlive a stop, and a row is ranked by what its evaluations say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from aft.attacks import PGD
from aft.clip import ModelSpec, ZeroShotModel
from aft.clip.cost import vit_cost
from aft.clip.reduced import reduced
from aft.methods import OptimizerSpec, Phase, TeCoA, WarmStart
from bench import cheaper_report, cheaper_training
from bench.meter import MARKS, Meter, cost_of_a_forward
from bench.step_cost import Part, parts_of, planned, spent, summed
from datamodules import Sample
from tests.conftest import TINY, make_trainer

CONFIG: dict[str, Any] = TINY["model_cfg"]
PGD2 = PGD(eps="8/255", step_size="4/255", steps=2)


def run(folder: Path, meter: Meter, steps: int, checkpoint: Path | None = None, **settings: Any) -> TeCoA:
    """TeCoA on the sample, metered, saved at each mark."""
    plain: dict[str, Any] = {"attack": PGD2, "val_attack": PGD2, "optimizer": OptimizerSpec(lr=1e-3, schedule="constant")}
    method = TeCoA(ModelSpec("tiny"), **(plain | settings))
    data = Sample(batch_size=8, holdout=14, augment="crop_flip")
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=meter.every, save_top_k=-1)
    trainer = make_trainer(folder, max_steps=steps, limit_val_batches=0, enable_checkpointing=True, callbacks=[meter, saver])
    trainer.fit(method, datamodule=data, ckpt_path=checkpoint)
    return method


@pytest.mark.parametrize(("side", "kept"), [(32, None), (16, None), (32, torch.tensor([1, 2, 7])), (24, torch.tensor([0]))])
def test_what_a_smaller_forward_costs(model: ZeroShotModel, side: int, kept: torch.Tensor | None) -> None:
    """The cost model with fewer pixels and patches, against torch's own count, within 2 % (norms and pooling are left out)."""
    images = torch.rand(2, 3, 32, 32)
    with reduced(model.visual, side, kept), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.encode(images)
    assert counter.get_total_flops() == pytest.approx(2 * vit_cost(CONFIG, side, None if kept is None else len(kept)).forward, rel=0.02)


@pytest.mark.parametrize(("settings", "part"), [
    ({}, Part(1.0, 2)),
    ({"phases": [Phase(until=1.0, drop_patches=0.5)]}, Part(1.0, 2, drop_patches=0.5)),
    ({"phases": [Phase(until=1.0, resolution=16, attack={"steps": 1})]}, Part(1.0, 1, side=0.5)),
    ({"phases": [Phase(until=1.0, clean=True)]}, Part(1.0, 0)),
    ({"warm_start": WarmStart(free=True)}, Part(1.0, 0, free=True)),
], ids=lambda value: "" if isinstance(value, Part) else next(iter(value), "plain"))  # fmt: skip
def test_the_meter_counts_what_the_cost_model_says(settings: dict[str, Any], part: Part, tmp_path: Path) -> None:
    """In a real run, its evaluations left out: four steps of eight images."""
    meter = Meter(every=2)
    run(tmp_path, meter, 4, **settings)
    expected = 4 * 8 * part.operations(CONFIG) / vit_cost(CONFIG).forward
    assert meter.sums["cost"] == pytest.approx(expected, rel=1e-9) and meter.sums["images"] == 32
    assert [mark["step"] for mark in meter.marks] == [2, 4]
    assert json.loads((tmp_path / MARKS).read_text()) == meter.marks


def test_a_free_forward_costs_its_whole_backward() -> None:
    """3 F: weights and pixels at once."""
    assert cost_of_a_forward(CONFIG, 32, 16, weights=True, pixels=True) == 3
    assert cost_of_a_forward(CONFIG, 32, 16, weights=False, pixels=False) == 1


def test_a_resumed_meter_is_an_uninterrupted_one(tmp_path: Path) -> None:
    """Killed at step 3, after the checkpoint of step 2: costs and accuracies are those of a whole run, the lost step counts once."""
    whole = Meter(every=2)
    run(tmp_path / "whole", whole, 4)
    run(tmp_path / "parts", Meter(every=2), 3)
    meter = Meter(every=2)
    run(tmp_path / "parts", meter, 4, next((tmp_path / "parts").glob("*step=2.ckpt")))
    assert whole.marks == meter.marks


def test_the_evaluation_changes_nothing(tmp_path: Path) -> None:
    """The same weights with a mark at every step and with none."""
    often, never = run(tmp_path / "a", Meter(every=1), 3), run(tmp_path / "b", Meter(every=100), 3)
    assert all(torch.equal(a, b) for a, b in zip(often.model.parameters(), never.model.parameters(), strict=True))


def marks(*robust: float, cost: float = 1.0) -> list[dict[str, float]]:
    """One mark a hundred steps, a hundred images a unit of cost."""
    return [{"step": 100.0 * k, "images": 100.0 * k * cost, "cost": k * cost, "clean_accuracy": 0.3, "robust_accuracy": value}
            for k, value in enumerate(robust, 1)]  # fmt: skip


def test_when_a_run_is_over() -> None:
    """Reached, at whatever evaluation, and the least steps made; without a target never."""
    meter = Meter(target=0.2, least=400)
    for robust, over in [((0.1,) * 12, False), ((0.1, 0.25, 0.1), False), ((0.1, 0.25, 0.1, 0.1), True), ((0.1,) * 4 + (0.2,), True)]:
        meter.marks = marks(*robust)
        assert meter.over() == over
    meter = Meter()
    meter.marks = marks(0.9)
    assert not meter.over()


def test_rows_are_ranked_by_their_evaluations(tmp_path: Path) -> None:
    """The target is the baseline's mean end; first crossing, equal time, not reached, warnings."""
    plain: dict[str, Any] = {"plan": 400, "model": {}, "warned": []}
    late = {"phases": [{"until": 0.5, "attack": {"steps": 1}}]}
    rows = {
        "tecoa_seed0": {**plain, "marks": marks(0.1, 0.18, 0.19, 0.18)},
        "tecoa_seed1": {**plain, "marks": marks(0.1, 0.15, 0.18, 0.22)},
        "free_4": {**plain, "marks": marks(0.1, 0.21, cost=0.5)},
        "late_strength": {**plain, "model": late, "marks": marks(0.1, 0.19, 0.21, 0.21, 0.21)},
        "fgsm": {**plain, "marks": marks(*[0.1] * 12, 0.5), "warned": ["catastrophic overfitting at step 100"]},
    }
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe = yaml.safe_load(cheaper_training.RECIPE.read_text())

    def table() -> list[list[str]]:
        """Its cells."""
        page = cheaper_report.page(recipe, tmp_path)
        assert "20.0 % robust accuracy (mean of 2 seeds" in page
        return [text.split(" | ") for text in page.splitlines() if text.startswith("| ")][1:]

    assert "not timed yet" in cheaper_report.page(recipe, tmp_path) and not table()
    ratios = {name: [[1.0] * (1 + len(row.get("model", {}).get("phases", [])))] for name, row in recipe["rows"].items()}
    own = {"free_4": [[1.7], [1.8], [2.0]], "late_strength": [[0.4, 1.2], [0.4, 1.4], [0.3, 1.2]]}
    (tmp_path / "times.json").write_text(json.dumps({"ratios": {**ratios, **own}}))
    found = table()
    assert [cells[0] for cells in found] == ["| late_strength", "| free_4", "| tecoa_seed1", "| tecoa_seed0", "| fgsm"]
    assert found[0][2] == "0.50", "two hundred cheap steps, one hundred dear ones, of four hundred"
    assert found[1][2:5] == ["0.90", "0.25", "0.25"] and found[1][-2] == "1.80 (1.70 to 2.00)"
    assert found[0][-2] == "0.88 (0.84 to 1.00)", "of five hundred: two hundred cheap, three hundred dear"
    assert found[2][2] == "1.00" and found[2][5].startswith("22.0 ±")
    assert found[3][2] == found[4][2] == "not reached" and "catastrophic overfitting at step 100" in found[4][-1]


def test_each_kind_of_steps_is_timed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A phase for a whole run, and what comes after it; over the mean of the baseline's steps before and after; in turn, and back."""
    late = {"phases": [{"until": 0.7, "clean": True}], "warm_start": {}}
    recipe = {"timing": {"rounds": 2, "steps": 8}, "rows": {"late": {"model": late}, "plain": {}}}
    asked: list[tuple[str, dict[str, Any]]] = []
    given = iter([1.0, 1.0, 2.0, 4.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0])

    def seconds(recipe: Any, label: str, row: Any, model: dict[str, Any]) -> float:
        """As the clock might say."""
        asked.append((label, model))
        return next(given)

    monkeypatch.setattr(cheaper_training, "seconds_of_a_step", seconds)
    times = cheaper_training.step_times(recipe)
    assert times == {"late": [[0.5, 1.0], [0.5, 0.75]], "plain": [[2.0], [0.25]]} and cheaper_report.typical(times["late"]) == [0.5, 0.875]
    assert [model for _, model in asked[:3]] == [{}, {"phases": [{"until": 1.0, "clean": True}], "warm_start": {}}, {"warm_start": {}}]
    assert [label for label, _ in asked] == [
        "baseline-before-0", "late-0-0", "late-1-0", "plain-0-0", "baseline-after-0",
        "baseline-before-1", "plain-0-1", "late-0-1", "late-1-1", "baseline-after-1",
    ]  # fmt: skip


@pytest.mark.parametrize("label", yaml.safe_load(cheaper_training.RECIPE.read_text())["rows"])
def test_every_plan_spends_what_the_baseline_spends(label: str) -> None:
    """Within a step; the phases that a run gets end at the plan's steps; a run may last three times the baseline's time, rounded up."""
    recipe = yaml.safe_load(cheaper_training.RECIPE.read_text())
    row, budget = recipe["rows"][label], 400 * Part(1.0, 2).operations(CONFIG)
    parts = parts_of(row.get("model", {}), 2, 32)
    times = [0.6] * (len(parts) - 1) + [0.9]
    length = cheaper_training.length_of(row, recipe, CONFIG, 32, times)
    plan, steps = length.plan, length.most
    assert spent(parts, CONFIG, plan, plan) == pytest.approx(budget, abs=1.01 * max(p.operations(CONFIG) for p in parts))
    assert planned(parts, CONFIG) * plan == pytest.approx(budget, rel=2e-3)
    assert 1200 <= summed(times, parts, steps, plan) < 1200 + 50
    assert summed(times, parts, length.least, plan) <= 400 < summed(times, parts, length.least + 50, plan)
    phases = cheaper_training.with_ends(row.get("model", {}), plan, steps).get("phases", [])
    assert [round(p["until"] * steps) for p in phases] == [round(p["until"] * plan) for p in row.get("model", {}).get("phases", [])]
    assert steps % recipe["every"] == 0 == length.least % recipe["every"]


def test_a_row_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is trained, in place of nothing done and nothing said; a baseline's label, which its row names, is known."""
    monkeypatch.setattr(cheaper_training, "baseline", lambda recipe: pytest.fail("trains"))
    monkeypatch.setattr("sys.argv", ["cheaper_training", "--only", "tecoa_seed0", "fgsn"])
    with pytest.raises(SystemExit):
        cheaper_training.main()
    assert "did you mean 'fgsm'" in capsys.readouterr().err


def test_a_row_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is measured; the end names it."""
    monkeypatch.setattr(cheaper_training, "RESULTS", tmp_path)
    monkeypatch.setattr(cheaper_training, "baseline", lambda recipe: 0.2)
    monkeypatch.setattr("sys.argv", ["cheaper_training"])
    with pytest.raises(SystemExit, match="--time"):
        cheaper_training.main()
    rows = yaml.safe_load(cheaper_training.RECIPE.read_text())["rows"]
    ones = {name: [[1.0] * (1 + len(row.get("model", {}).get("phases", [])))] for name, row in rows.items()}
    (tmp_path / "times.json").write_text(json.dumps({"ratios": ones}))

    def train(recipe: Any, label: str, *given: Any) -> dict[str, Any]:
        """One fails."""
        if label == "fgsm":
            raise SystemExit("out of memory")
        return {"marks": marks(0.1), "warned": []}

    monkeypatch.setattr(cheaper_training, "train_row", train)
    monkeypatch.setattr("sys.argv", ["cheaper_training", "--only", "fgsm", "free_2"])
    with pytest.raises(SystemExit, match="fgsm: out of memory"):
        cheaper_training.main()
    assert list(cheaper_report.kept(tmp_path)) == ["free_2"]
