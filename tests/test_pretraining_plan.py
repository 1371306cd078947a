"""Equal compute: the way of shares spends what the way of fixed steps spends, and what a step costs is counted rightly."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from aft.clip import ModelSpec, cost, load_model
from bench import pretraining


def test_both_ways_spend_the_same() -> None:
    ways = yaml.safe_load(pretraining.WAYS.read_text())["ways"]
    flops = {"fgsm": 300, "pgd2": 400, "clean": 200, "tecoa": 150}
    steps = pretraining.plan(ways, flops)
    spent = {way: sum(flops[p["name"]] * n for p, n in zip(ways[way], steps[way], strict=True)) for way in ways}
    assert steps["clean_pretraining_then_tecoa"] == [5000, 1546]
    assert spent["adversarial_pretraining"] == pytest.approx(spent["clean_pretraining_then_tecoa"], rel=1e-3)
    assert steps["adversarial_pretraining"][1] * 400 == pytest.approx(0.2 * spent["adversarial_pretraining"], rel=1e-3)


def test_a_step_costs_what_the_cost_model_says(tiny: ModelSpec, tmp_path: Path) -> None:
    """Within 2 %, by the command that trains; a second count in the same folder, after a kill, is the same."""
    attack = {"class_path": "aft.attacks.PGD", "init_args": {"eps": "2/255", "step_size": "2/255", "steps": 2}}
    shared = {
        "model": {"class_path": None, "init_args": {"clip": {"name": tiny.name}, "attack": attack}},
        "data": {"class_path": "datamodules.Sample", "init_args": {"batch_size": 8}},
        "trainer": {"accelerator": "cpu"},
    }
    counted = [pretraining.flops_of_a_step({"kind": "TeCoA", "shared": shared}, tmp_path) for _ in range(2)]
    expected = 8 * cost.vit_cost(load_model(tiny).record.config).fine_tuning_step(2)
    assert counted == [pytest.approx(expected, rel=0.02)] * 2
