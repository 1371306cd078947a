"""What ``bench`` measures with is there: each module can be imported as its command would."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCH.glob("[!_]*.py")))
def test_every_module_can_be_imported(name: str) -> None:
    """A name of the library that went away would be seen after hours, or never."""
    if name == "against_autoattack":
        pytest.importorskip("pyautoattack")
    assert importlib.import_module(f"bench.{name}").__doc__
