"""The shape of the repository, read from its files: arrows between the rooms, no large file, no path of somebody's machine.

Imports are read from the syntax tree, so those inside functions and under `TYPE_CHECKING` count too.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LARGEST_FILE = 20 * 1024**2  # bytes
ANYWHERE = {"aft", "aft.errors", "aft.batch"}  # what any room may import; `aft` itself holds the version
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
WITHOUT_LIGHTNING = ("aft.attacks", "aft.losses")

# Room -> what it may import besides itself and ANYWHERE. A name stands for the module and all that is in it.
ARROWS: dict[str, set[str]] = {
    "aft": set(),
    "aft.errors": set(),
    "aft.batch": set(),
    "aft.losses": set(),
    "aft.clip": set(),
    "aft.cards": set(),
    "aft.submit": set(),
    "aft.settings": set(),
    "aft.attacks": {"aft.clip.stages"},  # the protocol of a staged model, no model
    "aft.methods": {"aft.attacks", "aft.clip", "aft.losses"},
    "aft.defenses": {"aft.attacks", "aft.clip", "aft.losses"},
    "aft.evaluation": {"aft.attacks", "aft.cards", "aft.clip", "aft.defenses", "aft.losses", "aft.methods"},
    "aft.export": {"aft.cards", "aft.clip", "aft.defenses", "aft.methods"},
    "datamodules": {"aft.clip.prompts"},
    "callbacks": {"aft.attacks", "aft.methods"},
}
NARROWER: dict[str, set[str]] = {"aft.losses": {"aft.errors"}, "aft.errors": set(), "aft": set()}  # of ANYWHERE, this much alone
UPSTAIRS = {"train", "eval", "bench"}  # they may import everything, and no room may import them
OUTSIDE = {"train", "eval", "bench", "tests", "datamodules", "callbacks", "aft"}  # first parts of the project's own modules


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def inside(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def room_of(module: str) -> str | None:
    """The room of a module: its longest listed prefix; `aft` alone only for `aft/__init__.py`."""
    rooms = [room for room in ARROWS if inside(module, room) and (room != "aft" or module == "aft")]
    return max(rooms, key=len, default=None)


def is_module(name: str, root: Path) -> bool:
    place = root.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of what a file imports; `from package import module` yields the module."""
    package = list(path.relative_to(root).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield node.lineno, name if is_module(name, root) else base


def may_import(room: str, target: str) -> bool:
    """Whether a file of `room` may import the module `target` of the project."""
    if inside(target, room) and room != "aft":
        return True
    if target in ANYWHERE:
        return target in NARROWER.get(room, ANYWHERE)
    return any(inside(target, allowed) for allowed in ARROWS[room])


def wrong_arrows(root: Path) -> list[str]:
    """Every import against the arrows, as `file:line room -> module`."""
    found = []
    for path in sorted(p for top in ("aft", "datamodules", "callbacks") for p in (root / top).rglob("*.py")):
        room, where = room_of(module_name(path, root)), path.relative_to(root)
        if room is None:
            found.append(f"{where}: in no room; add it to ARROWS and to docs/architecture.md")
            continue
        for line, target in imports(path, root):
            own = target.split(".")[0] in OUTSIDE
            if own and not may_import(room, target):
                found.append(f"{where}:{line} {room} -> {target}")
            if room in WITHOUT_LIGHTNING and target.split(".")[0] in LIGHTNING:
                found.append(f"{where}:{line} {room} -> {target}")
    return found


def test_arrows_point_one_way():
    assert not wrong_arrows(ROOT), "imports against the arrows of docs/architecture.md"


def test_the_arrows_have_no_circle():
    """The table itself can be put in an order in which every room comes after all it imports."""
    left = {room: {room_of(target) for target in targets} - {room} for room, targets in ARROWS.items()}
    while left:
        ready = {room for room, targets in left.items() if not targets & set(left)}
        assert ready, f"a circle among {sorted(left)}"
        left = {room: targets for room, targets in left.items() if room not in ready}


WRONG = {
    "aft/losses/a.py": "from aft.clip import model",
    "aft/losses/b.py": "from aft.batch import Batch",
    "aft/losses/c.py": "import lightning.pytorch as L",
    "aft/losses/d.py": "from ..attacks.pgd import PGD",
    "aft/attacks/a.py": "def late():\n    from aft import methods",
    "aft/attacks/b.py": "from aft.losses import dlr",
    "aft/attacks/d.py": "from aft.clip import model",
    "aft/attacks/c.py": "from pytorch_lightning import Trainer",
    "aft/clip/a.py": "import aft.methods.base",
    "aft/methods/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from datamodules.sample import Sample",
    "aft/methods/b.py": "from aft.evaluation import runner",
    "aft/methods/c.py": "from .. import defenses",
    "aft/methods/__init__.py": "from ..evaluation.runner import run",
    "aft/defenses/a.py": "from aft.methods import TeCoA",
    "aft/evaluation/a.py": "import callbacks",
    "aft/evaluation/b.py": "from eval import main",
    "aft/evaluation/c.py": "from aft.export import hf",
    "aft/export/a.py": "from aft.evaluation.runner import run",
    "aft/cards.py": "from aft.clip.model import ZeroShotModel",
    "aft/errors.py": "from aft.batch import Batch",
    "aft/__init__.py": "from aft.methods import TeCoA",
    "aft/helpers/a.py": "",
    "datamodules/a.py": "from aft.clip.weights import load",
    "datamodules/b.py": "from train import main",
    "callbacks/a.py": "from aft.evaluation import runner",
    "callbacks/b.py": "from tests.conftest import model",
}
RIGHT = {
    "aft/errors.py": "import difflib",
    "aft/batch.py": "from aft.errors import DataError",
    "aft/losses/__init__.py": "from aft.losses.dlr import dlr\nfrom .dlr import dlr\nfrom ..errors import InputError",
    "aft/attacks/base.py": "import torch\nfrom aft.clip.stages import Staged\nfrom aft.batch import Batch\nfrom aft import __version__",
    "aft/methods/__init__.py": "import lightning.pytorch as L\nfrom aft import losses\nfrom ..clip import model\nfrom . import base",
    "aft/evaluation/runner.py": "from aft.cards import write\nfrom aft.defenses.noise import Noise",
    "datamodules/sample.py": "from aft.clip.prompts import templates\nfrom aft.clip import prompts\nfrom datamodules.base import Base",
    "datamodules/folder.py": "from aft.batch import Batch",
    "callbacks/log.py": "from aft.methods import TeCoA\nfrom aft.attacks.pgd import PGD",
    "train.py": "import callbacks, datamodules\nfrom aft.evaluation import runner",
}


def made_up_tree(root: Path, files: dict[str, str]) -> Path:
    """A small repository; the modules that `from package import module` names are there too."""
    named = ["clip/model", "clip/prompts", "losses/dlr", "attacks/pgd", "methods/base", "defenses/noise", "evaluation/runner", "export/hf"]
    for name, text in [*((f"aft/{name}.py", "") for name in named), *files.items()]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_import_is_caught(name, tmp_path):
    """This file can fail: each made-up wrong import is named, and nothing else is."""
    found = wrong_arrows(made_up_tree(tmp_path, {name: WRONG[name]}))
    assert [place.split(":")[0] for place in found] == [name]


def test_right_imports_are_let_through(tmp_path):
    assert wrong_arrows(made_up_tree(tmp_path, RIGHT)) == []


def test_losses_and_attacks_load_without_lightning():
    """Not through a third room either: a fresh Python imports both, and Lightning is not among its modules."""
    names = [room for room in WITHOUT_LIGHTNING if is_module(room, ROOT)]
    code = f"import sys\nimport {', '.join(names)}\nprint(*sorted(set(sys.modules) & {LIGHTNING!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""


# Written in pieces, so that this file does not hold what it looks for.
FOREIGN_PATH = re.compile(r"(?<![\w.)}>-])/(?:work|root|home|Users)/")
LEFTOVER = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME)\b")


def kept_files(root: Path) -> list[Path]:
    """What git tracks, or would with `git add`; the largest test of a file is that somebody clones it."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of tracked files")
    return [root / name for name in sorted(set(listed.stdout.split("\0"))) if name and (root / name).is_file()]


def lines_with(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    """`file:line` of each match in text files; files with a zero byte or not in UTF-8 are not text."""
    found = []
    for path in paths:
        raw = path.read_bytes()
        if b"\0" in raw:
            continue
        try:
            lines = raw.decode("utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path}:{number}: {line.strip()[:100]}" for number, line in enumerate(lines, 1) if pattern.search(line)]
    return found


def test_no_large_file():
    assert not [f"{path} {path.stat().st_size}" for path in kept_files(ROOT) if path.stat().st_size > LARGEST_FILE]


def test_no_path_of_a_machine():
    assert not lines_with(FOREIGN_PATH, kept_files(ROOT))


def test_nothing_is_left_to_do():
    assert not lines_with(LEFTOVER, kept_files(ROOT))


@pytest.mark.parametrize("text", ["cd /" + "work/main", "open('/" + "root/x')", "x = \"/" + "home/me/data\"", "~ is /" + "Users/me"])
def test_a_path_of_a_machine_is_caught(text, tmp_path):
    (tmp_path / "a.txt").write_text(f"fine\n{text}\n", encoding="utf-8")
    (tmp_path / "b.bin").write_bytes(b"\0" + text.encode())
    assert [place.split(":")[1] for place in lines_with(FOREIGN_PATH, sorted(tmp_path.iterdir()))] == ["2"]


@pytest.mark.parametrize("text", ["see ../work/main", "https://example.org/home/", "frame/work/x", "a/root/b"])
def test_other_paths_are_let_through(text, tmp_path):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert lines_with(FOREIGN_PATH, [tmp_path / "a.txt"]) == []


def test_something_left_to_do_is_caught(tmp_path):
    (tmp_path / "a.py").write_text("# TO" + "DO: later\nTODOS = 1\n", encoding="utf-8")
    assert len(lines_with(LEFTOVER, [tmp_path / "a.py"])) == 1
