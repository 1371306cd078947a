"""Loss curves without and with a speed-up: equal where the mathematics is the same, and seen where they are not."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest

from aft.clip import ModelSpec
from aft.methods import TeCoA
from bench import curves


@pytest.fixture(autouse=True)
def small(tiny: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model in MiniCLIP-32's place."""
    monkeypatch.setattr(curves, "MINI", tiny)


def test_the_folded_projection_leaves_the_curve_where_it_is(tmp_path: Path) -> None:
    out = tmp_path / "curves.json"
    assert curves.main(["--only", "folded", "--steps", "2", "--seeds", "1", "--out", str(out)]) == 0
    told = json.loads(out.read_text())["speed_ups"]["folded"]
    assert told["holds"] and len(told["with"][0]) == 2 and told["with"][0][0] > 0


def test_another_curve_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def heated(method: TeCoA) -> list[L.Callback]:
        method.logit_scale = 7.0
        return []

    monkeypatch.setitem(curves.SPEED_UPS, "folded", curves.SpeedUp(curves.untouched, heated))
    assert curves.main(["--only", "folded", "--steps", "1", "--seeds", "1", "--out", str(tmp_path / "curves.json")]) == 1
