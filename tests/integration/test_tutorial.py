"""docs/add_a_method.md: every block of it runs, as a reader would run it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integration.reader import ROOT, run, text_of, written

pytestmark = pytest.mark.timeout(280)


def test_every_block_of_the_tutorial_runs(tmp_path: Path) -> None:
    """The method trains, its objective too, its term over another method, and its own test passes."""
    page = "add_a_method.md"
    assert [*written(page, tmp_path)] == ["shrink.py", "far.py", "shrink.yaml", "test_shrink.py"] and text_of(page).count("```") == 8
    fit = [str(ROOT / "train.py"), "fit", "-c", "shrink.yaml"]
    assert "Shrink on Sample" in run(tmp_path, *fit)
    run(tmp_path, *fit, "--model.class_path", "far.Far", "--trainer.default_root_dir", "runs/far")
    plain = re.sub(r"shrink\.Shrink", "aft.methods.FARE", (tmp_path / "shrink.yaml").read_text()).replace("shortness:", "shrink.Shortness:")
    (tmp_path / "fare.yaml").write_text(plain)
    run(tmp_path, *fit[:3], "fare.yaml", "--trainer.default_root_dir", "runs/fare")
    run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shrink.py")
