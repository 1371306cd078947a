"""Equal compute: the way of shares spends what the way of fixed steps spends."""

from __future__ import annotations

import pytest
import yaml

from bench import pretraining


def test_both_ways_spend_the_same() -> None:
    ways = yaml.safe_load(pretraining.WAYS.read_text())["ways"]
    flops = {"fgsm": 300, "pgd2": 400, "clean": 200, "tecoa": 150}
    steps = pretraining.plan(ways, flops)
    spent = {way: sum(flops[p["name"]] * n for p, n in zip(ways[way], steps[way], strict=True)) for way in ways}
    assert steps["clean_pretraining_then_tecoa"] == [5000, 1546]
    assert spent["adversarial_pretraining"] == pytest.approx(spent["clean_pretraining_then_tecoa"], rel=1e-3)
    assert steps["adversarial_pretraining"][1] * 400 == pytest.approx(0.2 * spent["adversarial_pretraining"], rel=1e-3)
