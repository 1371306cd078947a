"""Laws of the calibration error: what the formula gives, on the images that count, and cards from before are still read."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest

from aft.cards import read_arrays
from aft.evaluation import Cell, evaluate, plan, report
from aft.evaluation.calibration import expected_calibration_error
from aft.evaluation.runner import card_path


def reference(confidence, right, bins=15) -> float:
    """Bin by bin in float64; no value here lies on an edge."""
    place = np.floor(np.asarray(confidence, dtype=np.float64) * bins).clip(0, bins - 1)
    return sum((place == b).mean() * abs(right[place == b].mean() - confidence[place == b].mean()) for b in np.unique(place))


def test_it_is_the_formula():
    """On random confidences, and in the limits: sure and right 0, sure and wrong 1; whoever is sure of 1 / K and as often right 0."""
    random = np.random.default_rng(0)
    confidence, right = random.uniform(0.1, 1, 500), random.random(500) < 0.6
    assert expected_calibration_error(confidence, right) == pytest.approx(reference(confidence, right), abs=1e-6)
    ones = np.ones(8, np.float32)
    assert expected_calibration_error(ones, ones > 0) == 0 and expected_calibration_error(ones, ones < 0) == 1
    assert expected_calibration_error(np.full(10, 0.1), np.arange(10) == 0) == pytest.approx(0, abs=1e-6)
    assert expected_calibration_error(np.nextafter(ones, 2 * ones), ones > 0) == 0  # a softmax that rounds above 1 is no logit


def test_it_is_on_the_card_clean_and_attacked(model, data, tmp_path):
    """Of the stored confidences and verdicts, those under attack on the last image shown; in the CSV; none without attacks."""
    cell = Cell(model, data, plan("apgd", eps=0.02, steps=3, targets=2, classes=5))
    card = evaluate(cell, tmp_path)
    seen = read_arrays(card_path(tmp_path, "model", cell).with_suffix(".npz"))
    told = card["metrics"]["calibration"]
    assert told["clean"] == pytest.approx(reference(seen["clean_confidence"], seen["clean"]), abs=1e-6) and told["n"] == 40
    assert told["attacked"] == pytest.approx(reference(seen["confidence"], seen["right"][:, -1]), abs=1e-6)
    assert (seen["confidence"] != seen["clean_confidence"])[seen["clean"]].all() and told["attacked"] != told["clean"]
    assert (seen["confidence"] == seen["clean_confidence"])[~seen["clean"]].all()
    clean = evaluate(replace(cell, protocol=plan("clean", eps=0, steps=1, targets=1, classes=5)), tmp_path)
    assert clean["metrics"]["calibration"]["attacked"] is None and clean["metrics"]["calibration"]["clean"] == told["clean"]
    older = {**card, "metrics": {name: value for name, value in card["metrics"].items() if name not in ("calibration", "attack_success")}}
    rows = list(csv.DictReader(report.write_csv([("a", card), ("b", older)], tmp_path / "t.csv").open()))
    assert float(rows[0]["calibration_error_attacked"]) == told["attacked"] and rows[1]["calibration_error_attacked"] == ""
    assert rows[0]["attack_success_drop"] == rows[1]["attack_success_drop"] != ""


def test_attack_success_by_both_definitions(model, data, tmp_path):
    """Counted from the verdicts: of all images those that the attack turned, and the same of those that were right."""
    cell = Cell(model, data, plan("apgd", eps=0.02, steps=3, targets=2, classes=5))
    told = evaluate(cell, tmp_path)["metrics"]["attack_success"]
    seen = read_arrays(card_path(tmp_path, "model", cell).with_suffix(".npz"))
    turned, right = (seen["clean"] & ~seen["right"][:, -1]).sum(), seen["clean"].sum()
    assert told["drop"] == pytest.approx(turned / 40) and told["of_right"] == pytest.approx(turned / right) and turned > 0
    assert told["drop_standard_error"] == pytest.approx((told["drop"] * (1 - told["drop"]) / 40) ** 0.5)
    assert told["of_right_standard_error"] == pytest.approx((told["of_right"] * (1 - told["of_right"]) / right) ** 0.5)
