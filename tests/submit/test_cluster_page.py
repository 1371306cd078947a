"""docs/cluster.md: every submission on the page is accepted, and its templates can be read by bash and Python."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from aft.submit.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
SHELL = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S)
LINES = "\n".join(SHELL).replace("\\\n", " ").splitlines()
SUBMISSIONS = [line for line in LINES if line.startswith("python -m aft.submit")]


def test_there_is_something_to_look_at() -> None:
    """Else the next tests could not fail."""
    assert len(SUBMISSIONS) >= 6 and len(SHELL) >= 5


@pytest.mark.parametrize("line", SUBMISSIONS)
def test_every_submission_is_accepted(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Rendered, with the example's site file for the reader's own."""
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(line, comments=True)[3:] if word not in ("--estimate", "--dry-run")]
    site = [str(ROOT / "configs/slurm/example.yaml") if word == "site.yaml" else word for word in words]
    assert main(["--dry-run", *site]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash")


def test_files_and_templates_are_right() -> None:
    """Every YAML that is named exists; shell blocks are bash, the Python block is Python."""
    named = set(re.findall(r"configs/[\w/]+\.yaml", PAGE))
    assert named and [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    assert all(subprocess.run(["bash", "-n"], input=block, text=True).returncode == 0 for block in SHELL)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    ast.parse(block)
