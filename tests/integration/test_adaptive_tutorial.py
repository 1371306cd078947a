"""docs/adaptive_evaluation.md: its defence is evaluated as a reader would do it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import eval as evaluation
from aft import cards
from tests.integration.reader import run, text_of, written

pytestmark = pytest.mark.timeout(280)


def test_the_command_for_defences_of_the_library_runs(tmp_path: Path) -> None:
    """As it stands on the page, on three images."""
    (line,) = (line for line in text_of("adaptive_evaluation.md").splitlines() if line.startswith("python eval.py"))
    ((_, card),) = evaluation.main([*shlex.split(line)[2:], "--n=3", "--threads=1", f"--out={tmp_path}"])
    assert card["defense"]["name"] == "ttc" and card["protocol"]["name"] == "adaptive_small"


def test_every_block_of_the_page_runs(tmp_path: Path) -> None:
    """Its card has undefended, oblivious and adaptive, and the table shows them."""
    text = text_of("adaptive_evaluation.md")
    ((name, body),) = written("adaptive_evaluation.md", tmp_path).items()
    assert text.count("```") == 6 and "```sh\npython smooth_rough.py\n```" in text
    code = [line for line in body.split("\n") if line.strip() and not line.startswith(("from", '"""'))]
    assert len(code) <= 30, len(code)
    told = run(tmp_path, name)
    assert "adapt. %" in told and "too few to say whether the defence helps" in told.replace("\n", " ")
    (path,) = (tmp_path / "runs").rglob("*.json")
    card = cards.read(path)
    assert card["defense"]["name"] == "smooth_rough" and {"undefended", "oblivious", "adaptive"} <= set(card["metrics"]["defended"])
    assert "d_gate" in card["per_attack"] and card["defense"]["gate_rates"] is not None
