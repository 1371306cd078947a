"""Programs of their own session: they end, or are ended with all that they started."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from bench import runs

#: Starts a child, writes its number to a file, and sleeps.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(str(child.pid))
{then}
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody asked for is none."""
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="asks /proc whether a process runs")
@pytest.mark.parametrize(("then", "error"), [("time.sleep(60)", TimeoutError), ("sys.exit('went wrong')", RuntimeError), ("", None)])
def test_no_process_outlives_its_command(then: str, error: type[Exception] | None, tmp_path: Path) -> None:
    """Neither after the limit, nor after a failure, nor after an end with a child left behind."""
    command = [sys.executable, "-c", PARENT.format(then=then), str(tmp_path / "pid")]
    if error is None:
        runs.to_the_end(command, 30)
    else:
        with pytest.raises(error):
            runs.to_the_end(command, 10 if error is TimeoutError else 30)
    child, until = int((tmp_path / "pid").read_text()), time.monotonic() + 5
    while alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(child)


def test_what_it_said_comes_back() -> None:
    """Its output where it ends well; where it does not, the end of it, below a first line without paths."""
    assert runs.to_the_end([sys.executable, "-c", "print('all is well')"], 30) == "all is well\n"
    with pytest.raises(RuntimeError, match="went wrong") as failed:
        runs.to_the_end([sys.executable, "-c", "raise SystemExit('went wrong')"], 30)
    assert str(failed.value).splitlines()[0] == "-c raise SystemExit('went wrong') ended with 1:"


def test_a_speed_is_measured_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that stands from another day would be given for one of now; other runs go on where they stopped."""
    recipe = {"shared": {"model": {"init_args": {"optimizer": {}}}, "data": {"init_args": {}}, "trainer": {}}}
    started: list[Path] = []

    def instead(*arguments: str, log: Path) -> None:
        """A run that logs its speed, another one each time."""
        started.append(log)
        with log.open("a") as output:
            output.write(f"images_per_second {len(started)}\n")

    monkeypatch.setattr(runs, "run", instead)
    method = runs.Method("a", "TeCoA")
    assert [runs.measured_speed(recipe, method, tmp_path / "a", 1e-4, 8) for _ in range(2)] == [1.0, 2.0]
    runs.fit(recipe, method, tmp_path / "a", 1e-4, 8, 0)
    assert len(started) == 2
