"""A card is unchecked, reliable or suspect; finished cards get their verdict without a new attack."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from aft import cards
from aft.evaluation import Cell, evaluate, plan
from aft.evaluation import verdict as verdicts
from aft.evaluation.runner import card_path
from aft.evaluation.verdict import CHEAP_IMAGES, WITHOUT_ATTACK


def cell_of(model, data, name: str = "apgd") -> Cell:
    """Of a small radius, with few steps."""
    return Cell(model, data, plan(name, eps=0.02, steps=8, targets=3, classes=5))


@pytest.fixture
def dear(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One dear doubt in the place of all: finds nothing, and notes how many images it was shown."""
    shown: list[int] = []
    monkeypatch.setattr("aft.evaluation.doubts.DEAR", {"E11": lambda case: shown.append(len(case.labels_n))})
    return shown


def test_without_dear_checks_a_sound_figure_is_unchecked(model, data, tmp_path: Path) -> None:
    card = evaluate(cell_of(model, data), tmp_path)
    assert card is not None and card["verdict"] == {"status": "unchecked", "failed_checks": []}
    assert card["metrics"]["checks"]["images"] == CHEAP_IMAGES and "E11" not in card["metrics"]["checks"]["made"]


def test_a_clean_figure_needs_the_cheap_ones_alone(model, data, tmp_path: Path) -> None:
    card = evaluate(cell_of(model, data, "clean"), tmp_path)
    assert card is not None and card["verdict"]["status"] == "reliable" and card["metrics"]["checks"]["made"] == list(WITHOUT_ATTACK)


def test_a_finished_card_is_doubted_without_a_new_attack(model, data, tmp_path: Path, dear: list[int], monkeypatch) -> None:
    """Once; asked for the same again, nothing is done."""
    cell = cell_of(model, data)
    before = evaluate(cell, tmp_path)
    monkeypatch.setattr("aft.evaluation.runner.Judge", None)
    for _ in range(2):
        card = evaluate(cell, tmp_path, checks=12)
    assert dear == [12] and card["verdict"]["status"] == "reliable"
    assert cards.read(card_path(tmp_path, "model", cell)) == card
    assert {**card, "verdict": None, "metrics": None} == {**before, "verdict": None, "metrics": None}


def test_what_fails_is_on_the_card_with_its_reason(model, data, tmp_path: Path, dear: list[int], monkeypatch) -> None:
    """Here a model that shifts its images by the mean of the batch."""
    plain = model.encode
    monkeypatch.setattr(model, "encode", lambda images, **settings: plain(images - 0.5 * images.mean(0) + 0.2, **settings))
    card = evaluate(cell_of(model, data), tmp_path, checks=8)
    assert card["verdict"]["status"] == "suspect" and "E8" in card["verdict"]["failed_checks"]
    assert "neighbours" in card["metrics"]["checks"]["failed"]["E8"]


def test_too_few_right_images_stay_unchecked(model, data, tmp_path: Path) -> None:
    """Nothing can be said of a model that is always wrong."""
    with torch.no_grad():
        said = model(data.images, model.text_bank(data.class_names, data.templates)).argmax(1)
    card = evaluate(cell_of(model, dataclasses.replace(data, labels_N=(said + 1) % 5)), tmp_path, checks=8)
    assert card["clean_accuracy"] < 0.1 and card["verdict"]["status"] == "unchecked"


def test_images_are_carried_over_only_where_there_are_other_models(model, data) -> None:
    """A check that was not made is not named as made."""
    cell = Cell(model, data, plan("pgd", eps="2/255", steps=2, targets=1, classes=len(data.class_names)))
    alone, beside = verdicts.doubts_of(cell, 8), verdicts.doubts_of(cell, 8, siblings=True)
    assert set(beside) - set(alone) == {"E19"} and not set(alone) - set(beside)


def test_a_random_model_needs_the_mean_over_its_draws(model, data) -> None:
    """E32 follows from E6, unless the attack takes 20 draws; a model that is not random needs none."""
    once = cell_of(model, data)
    often = Cell(model, data, plan("autoattack_rand", eps=0.02, steps=8, targets=3, classes=5))
    assert "E32" in verdicts.wrong_plan(once, {"E6": "differs"}) and not verdicts.wrong_plan(often, {"E6": "differs"})
    assert not verdicts.wrong_plan(once, {"E8": "differs"})


def test_the_losses_of_a_figure_are_told_where_dear_checks_are_made(model, data, tmp_path: Path, dear: list[int]) -> None:
    """E24 beside the verdict; the plan of a random model is looked at always."""
    card = evaluate(cell_of(model, data), tmp_path, checks=8)
    told = card["metrics"]["checks"]
    assert set(told["losses"]) == {"ce", "dlr", "dlr_targeted", "union"} and "E32" in told["made"]
