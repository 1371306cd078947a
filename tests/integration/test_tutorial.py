"""docs/add_a_method.md: every block of it runs, as a reader would run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(280)


def test_every_block_of_the_tutorial_runs(tmp_path: Path) -> None:
    """Its files are written as they stand; the method trains, its objective too, its term over another method, and its own test passes."""
    text = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w+)\n# file: (\S+)\n(.*?)```", text, re.S)
    assert [name for _, name, _ in blocks] == ["shrink.py", "far.py", "shrink.yaml", "test_shrink.py"] and text.count("```") == 8
    for _, name, body in blocks:
        (tmp_path / name).write_text(body, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    fit = [str(ROOT / "train.py"), "fit", "-c", "shrink.yaml"]
    assert "Shrink on Sample" in run(*fit)
    run(*fit, "--model.class_path", "far.Far", "--trainer.default_root_dir", "runs/far")
    plain = re.sub(r"shrink\.Shrink", "aft.methods.FARE", (tmp_path / "shrink.yaml").read_text()).replace("shortness:", "shrink.Shortness:")
    (tmp_path / "fare.yaml").write_text(plain)
    run(*fit[:3], "fare.yaml", "--trainer.default_root_dir", "runs/fare")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shrink.py")
