"""Rows that count forwards of an evaluation: an image, whatever number of them was there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from aft.evaluation import Cell
from bench.speed import evaluation
from bench.speed.row import Effort, NotHere

QUICK = Effort(quick=True)


@pytest.fixture(autouse=True)
def without_autoattack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own code takes a while."""
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)


def test_forwards_are_of_the_images_that_were_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them alone give the same figures as all of them."""
    cell_of = evaluation.cell_of

    def fewer(*given: Any) -> Cell:
        """As if only so many were right when clean."""
        cell = cell_of(*given)
        return replace(cell, data=cell.data.take(torch.arange(len(cell.data) // 2)))

    model = evaluation.robust_model()
    whole, ends = evaluation.broken_at_once(QUICK), evaluation.ends(model, "four", 2, quick=True)
    monkeypatch.setattr(evaluation, "cell_of", fewer)
    part = evaluation.broken_at_once(QUICK)
    assert part.values == whole.values and (part.told["images"], whole.told["images"]) == (2, 4)
    assert evaluation.ends(model, "four", 2, quick=True) == ends


def test_an_image_that_breaks_later_costs_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one that breaks at once, no more than a clean look, the 101 of APGD-CE and a fresh look; none where nothing breaks."""
    at_once, later = evaluation.broken_at_once(QUICK), evaluation.broken_usual(QUICK)
    assert len(later.values) == later.told["broken"] > 0
    assert at_once.values[0] < max(later.values) <= 103
    monkeypatch.setattr(evaluation, "USUAL", evaluation.NEVER)
    with pytest.raises(NotHere, match="breaks none"):
        evaluation.broken_usual(QUICK)


def test_a_robust_image_costs_more_than_one_that_breaks() -> None:
    """The ends have no and all images robust; between them an image costs no less than the straight line says."""
    found = evaluation.along_shares(QUICK)
    none, *between, every = found.told["curve"]
    assert (none["robust_share"], every["robust_share"]) == (0, 1) and none["forwards"] < every["forwards"]
    assert len(found.values) == len(between) == 1 and found.values[0] >= 1
    assert all(one["images"] == 4 and len(one["seconds"]) == 1 and min(one["seconds"]) > 0 for one in found.told["curve"])


def test_the_share_weighs_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a set of which a half is robust: (2 + 10) / (8 + 16); of the two ends alone 2 / 8 and 10 / 16. Without the package: nothing."""
    with pytest.raises(NotHere, match="pyautoattack"):
        evaluation.by_share(QUICK)
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(evaluation, "ends", lambda model, protocol, *rest: (2, 10) if protocol == "four" else (8, 16))
    found = evaluation.by_share(QUICK)
    assert found.values == [0.5] and found.told["by_robust_share"] == {"0": 0.25, "0.25": 0.4, "0.5": 0.5, "0.75": 8 / 14, "1": 0.625}
