"""docs/adaptive_evaluation.md: its defence is evaluated as a reader would do it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aft import cards

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(280)


def test_every_block_of_the_page_runs(tmp_path: Path) -> None:
    """The file is written as it stands and run; its card has undefended, oblivious and adaptive, and the table shows them."""
    text = (ROOT / "docs" / "adaptive_evaluation.md").read_text(encoding="utf-8")
    ((name, body),) = re.findall(r"```python\n# file: (\S+)\n(.*?)```", text, re.S)
    assert text.count("```") == 4 and "```sh\npython smooth_rough.py\n```" in text
    code = [line for line in body.split("\n") if line.strip() and not line.startswith(("from", '"""'))]
    assert len(code) <= 30, len(code)
    (tmp_path / name).write_text(body, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, name], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "adapt. %" in done.stdout and "too few to say whether the defence helps" in done.stdout.replace("\n", " ")
    (path,) = (tmp_path / "runs").rglob("*.json")
    card = cards.read(path)
    assert card["defense"]["name"] == "smooth_rough" and {"undefended", "oblivious", "adaptive"} <= set(card["metrics"]["defended"])
    assert "d_gate" in card["per_attack"] and card["defense"]["gate_rates"] is not None
