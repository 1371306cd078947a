"""docs/add_a_task.md: every block of it runs, as a reader would run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.reader import run, text_of, written

pytestmark = pytest.mark.timeout(280)


def test_every_block_of_the_tutorial_runs(tmp_path: Path) -> None:
    """The scenes are measured clean and under attack, to the card's end, and its own test passes."""
    page = "add_a_task.md"
    assert [*written(page, tmp_path)] == ["scenes.py", "detection.py", "measure.py", "test_detection.py"]
    assert text_of(page).count("```") == 8
    assert "objects named rightly" in run(tmp_path, "measure.py")
    card = json.loads(next((tmp_path / "runs" / "detection" / "cards").rglob("*.json")).read_text())
    assert card["task"] == "detection" and card["data"]["n"] == 24 and card["verdict"] == {"status": "unchecked", "failed_checks": []}
    assert card["robust_accuracy"] < card["clean_accuracy"] and card["per_attack"].keys() == {"apgd_ce", "apgd_t"}
    objects = card["metrics"]["objects"]
    assert objects["n"] == 48 and card["clean_accuracy"] <= objects["clean"] and objects["attacked"] < objects["clean"]
    run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_detection.py")
