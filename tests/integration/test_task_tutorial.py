"""docs/add_a_task.md: every block of it runs, as a reader would run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(280)


def test_every_block_of_the_tutorial_runs(tmp_path: Path) -> None:
    """Its files are written as they stand; the scenes are measured clean and under attack, to the card's end, and its own test passes."""
    text = (ROOT / "docs" / "add_a_task.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# file: (\S+)\n(.*?)```", text, re.S)
    assert [name for name, _ in blocks] == ["scenes.py", "detection.py", "measure.py", "test_detection.py"] and text.count("```") == 8
    for name, body in blocks:
        (tmp_path / name).write_text(body, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    assert "objects named rightly" in run("measure.py")
    card = json.loads(next((tmp_path / "runs" / "detection" / "cards").rglob("*.json")).read_text())
    assert card["task"] == "detection" and card["data"]["n"] == 24 and card["verdict"] == {"status": "unchecked", "failed_checks": []}
    assert card["robust_accuracy"] < card["clean_accuracy"] and card["per_attack"].keys() == {"apgd_ce", "apgd_t"}
    objects = card["metrics"]["objects"]
    assert objects["n"] == 48 and card["clean_accuracy"] <= objects["clean"] and objects["attacked"] < objects["clean"]
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_detection.py")
