"""docs/scaling.md says what the computation says, and the computation what its formula says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import yaml

from aft.clip.cost import text_forward, vit_cost
from bench import pretraining_cost as bench
from bench.cheaper_training import RECIPE, RESULTS
from bench.page import placed

CONFIG = open_clip.get_model_config("ViT-B-16")
F, TEXT = vit_cost(CONFIG), text_forward(CONFIG)
BASELINE = 2 * (F.forward + F.input_gradient) + F.forward + F.weight_gradient + 3 * TEXT


def test_the_page_is_what_is_computed() -> None:
    """Write it again with python -m bench.pretraining_cost."""
    page = bench.PAGE.read_text(encoding="utf-8")
    assert placed(page, "bench.pretraining_cost", bench.computed(yaml.safe_load(RECIPE.read_text()), RESULTS)) == page


def test_costs_of_a_pair_by_hand() -> None:
    """Plain training, two steps, free, and half of the steps at half of the side with one step."""
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["rows"]["half"] = {"model": {"phases": [{"until": 0.5, "resolution": 16, "attack": {"steps": 1}}]}}
    found = bench.estimates(recipe, Path("no_such_folder"))
    small = vit_cost({**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "image_size": 112}})
    low = small.forward + small.input_gradient + small.forward + small.weight_gradient + 3 * TEXT
    expected = {"no attack": F.forward + F.weight_gradient + 3 * TEXT, "baseline": BASELINE, "free_2": 3 * F.forward + 3 * TEXT,
                "half": (low + BASELINE) / 2}  # fmt: skip
    for name, of_a_step in expected.items():
        assert found[name].of_a_step == pytest.approx(of_a_step) and found[name].no_loss == pytest.approx(400e6 * of_a_step)
        assert found[name].measured is None


def test_what_was_measured_counts_images_and_phases(tmp_path: Path) -> None:
    """Reached 150 steps into a plan of 200, three quarters of it in the first phase: those images, at this tower's costs."""

    def row(step: int, cost: float, robust: float, plan: int) -> dict[str, Any]:
        """One evaluation."""
        mark = {"step": step, "images": 128.0 * step, "cost": cost, "clean_accuracy": 0.3,
                "robust_accuracy": robust}  # fmt: skip
        return {"marks": [mark], "plan": plan, "batch": 128, "warned": []}

    rows = {"tecoa_seed0": row(100, 100.0, 0.2, 100), "half": row(150, 80.0, 0.2, 200), "lost": row(100, 90.0, 0.1, 100)}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["rows"] = {"half": {"model": {"phases": [{"until": 0.5, "clean": True}]}}, "lost": {}}
    found = bench.estimates(recipe, tmp_path)
    clean = F.forward + F.weight_gradient + 3 * TEXT
    assert found["half"].measured == pytest.approx(400e6 * (100 * clean + 50 * BASELINE) / 100) and found["half"].images == 1.5
    (lost,) = [line for line in bench.computed(recipe, tmp_path).splitlines() if line.startswith("| lost ")]
    assert found["lost"].measured is None and "not reached" in lost and "no loss" in lost


def test_the_baseline_is_held_to_its_own_first_crossing(tmp_path: Path) -> None:
    """Two seeds that end at 0.25 and 0.5: one had their mean at half of its images, the other never has, and counts whole."""

    def row(*robust: float) -> dict[str, Any]:
        """An evaluation each 100 steps."""
        marks = [{"step": 100 * n, "images": 100.0 * n, "cost": 100.0 * n, "robust_accuracy": r} for n, r in enumerate(robust, 1)]
        return {"marks": marks, "plan": 200, "batch": 1, "warned": []}

    rows = {"tecoa_seed0": row(0.125, 0.25), "tecoa_seed1": row(0.375, 0.5), "same": row(0.125, 0.375)}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["rows"] = {"same": {}}
    found = bench.estimates(recipe, tmp_path)["same"]
    assert found.images == pytest.approx(200 / 150) and found.measured == pytest.approx(400e6 * BASELINE * 200 / 150)


def test_hours_and_the_published_run() -> None:
    """Its own hours come back; the other end is the assumption."""
    operations = bench.estimate([bench.Part(float("inf"), 0)], CONFIG).no_loss
    assert bench.gpu_hours(operations, 32).endswith(" to 11,000")
    assert bench.gpu_hours(400e12 * 3600 * 12).startswith("12 to ")
