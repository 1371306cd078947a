"""What ``bench`` measures with is there: each module can be imported as its command would."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from aft.errors import ConfigError, ending_calmly

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCH.glob("[!_]*.py")))
def test_every_module_can_be_imported(name: str) -> None:
    """A name of the library that went away would be seen after hours, or never."""
    if name == "against_autoattack":
        pytest.importorskip("pyautoattack")
    assert importlib.import_module(f"bench.{name}").__doc__


COMMANDS = [path for path in (*sorted(BENCH.glob("*.py")), BENCH / "speed" / "__main__.py") if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_command_ends_calmly(path: Path) -> None:
    """What a user can mend is one sentence; ``scaling_two`` is started by ``scaling`` alone."""
    assert path.stem == "scaling_two" or "with ending_calmly():" in path.read_text().split('if __name__ == "__main__":')[1]


def test_a_wrong_setting_is_one_line_and_a_fault_of_ours_a_traceback() -> None:
    """Five steps are too few for the kept figures."""
    words = [sys.executable, "-m", "bench.curves", "--only", "patches", "--steps", "5"]
    done = subprocess.run(words, cwd=BENCH.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: too little is measured for results/curves.json: give --out FILE.\n")
    with pytest.raises(SystemExit, match="error: eps = 3"), ending_calmly():
        raise ConfigError("eps = 3")
    with pytest.raises(ZeroDivisionError), ending_calmly():
        _ = 1 / 0
