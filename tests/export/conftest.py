"""Small CLIPs by name, for the tests of exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from aft.clip import ZeroShotModel, load_model, weights
from tests.export.models import folder_of


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ZeroShotModel]:
    """``make(name)``: that model, which is also known by its name."""

    def made(name: str) -> ZeroShotModel:
        """Loaded."""
        monkeypatch.setitem(weights.EMBEDDED, name, folder_of(name, tmp_path))
        return load_model(name)

    return made
