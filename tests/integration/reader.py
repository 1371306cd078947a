"""A page of docs as its reader uses it: the files that it shows are written as they stand, and its commands run beside them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def text_of(page: str) -> str:
    """What stands in ``docs/PAGE``."""
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def written(page: str, folder: Path) -> dict[str, str]:
    """Writes every block of the page that names its file into the folder; their texts by name, in the order of the page."""
    blocks = dict(re.findall(r"```\w+\n# file: (\S+)\n(.*?)```", text_of(page), re.S))
    for name, body in blocks.items():
        (folder / name).write_text(body, encoding="utf-8")
    return blocks


def run(folder: Path, *words: str) -> str:
    """Python in the folder, with this project and the folder's files to import; what it printed. It must end well."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
