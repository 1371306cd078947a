"""README.md: every command of its shell blocks, and its Python blocks, as a reader would run them, in their order.

What is cheap runs for real, with small settings added at the end. Read only, by ``--print_config`` or in the Makefile, are the commands
that need several GPUs, a download, or the whole test run: ``READ_ONLY`` says which and why. A new command in the README fails until it
is in a table.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aft.submit.__main__ as submit_command
import eval as eval_command
import train
from aft.cards import read
from datamodules.sample import DATA, ShardSource

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.timeout(280)

FIT = ["--trainer.accelerator=cpu", "--trainer.max_steps=1", "--trainer.max_epochs=-1", "--trainer.limit_val_batches=1",
       "--trainer.val_check_interval=1", "--trainer.check_val_every_n_epoch=1", "--data.init_args.batch_size=8"]  # fmt: skip
EMBEDDED = ["--model.init_args.clip={name: miniclip32, pretrained: null}",  # OpenAI's weights are a download
            "--data.init_args.image_size=32", "--data.init_args.holdout=8"]  # fmt: skip
MEASURE = ["--n=16", "--eps=[2/255]", "--steps=2", "--targets=2", "--batch_size=16", "--threads=1"]

#: How a command begins -> what is added to it.
RUN: dict[str, list[str]] = {
    "python train.py fit -c configs/quickstart.yaml --model": FIT,
    "python train.py fit -c configs/quickstart.yaml": FIT,
    "python train.py fit -c configs/methods/tecoa.yaml -c configs/data/folder.yaml --data": [*FIT, *EMBEDDED],
    "python eval.py -c configs/eval/quickstart.yaml": MEASURE,
    "python eval.py -c configs/eval/apgd.yaml --weights": MEASURE,
    "python eval.py --data datamodules.Sample --defense low_pass": ["--n=3", "--threads=1"],
    "python eval.py report results/ 'runs/*'": ["--out=runs/report"],
    "python eval.py report results/ --examples": ["--out=runs/examples"],
    "python eval.py external": [],
}
#: How a command begins -> why it is read and not run.
READ_ONLY = {
    "python -m aft.submit": "a cluster; tests/slurm has one",
    "make ": "a whole installation, a training, or all tests",
    "python train.py fit -c configs/methods/tecoa.yaml -c configs/data/folder.yaml -c configs/trainer/ddp.yaml": "several GPUs",
    "python eval.py -c configs/eval/apgd.yaml --model ViT-B-32/openai": "a download",
    "python eval.py -c configs/eval/zero_shot_suite.yaml": "data sets that are not embedded",
    "python eval.py -c configs/eval/defenses_table.yaml": "hours; tests/evaluation/test_eval_command.py runs it on four images",
    "python eval.py -c configs/eval/hybrid.yaml": "hours; tests/evaluation/test_eval_command.py runs it on four images",
}


def commands() -> list[str]:
    """Lines of the shell blocks, comments taken away, continued lines joined."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, flags=re.S)).replace("\\\n", " ")
    return [shlex.join(words) for line in blocks.splitlines() if (words := shlex.split(line, comments=True))]


def begins(command: str, table: Any) -> str | None:
    """The entry of a table that a command begins with; the longest, where one begins with the other."""
    return max((begin for begin in table if command.startswith(begin)), key=len, default=None)


def main_of(words: list[str]) -> Callable[[list[str]], Any]:
    """The script that a command starts."""
    return {"train.py": train.main, "eval.py": eval_command.main}[words[1]]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a checkout whose user has photographs: what commands write stays in it."""
    for name in ("configs", "results"):
        (tmp_path / name).symlink_to(ROOT / name)
    source = ShardSource(sorted(DATA.glob("*test*.tar")))
    for label, name in ((3, "cat"), (8, "ship")):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        for position in [i for i, y in enumerate(source.labels) if y == label][:12]:
            (tmp_path / "photos" / "train" / name / f"{position}.jpg").write_bytes(source.read(position))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_is_in_one_table_and_no_entry_is_of_the_past() -> None:
    """So that a new command cannot be forgotten, nor an old one kept."""
    tables = [{begins(command, table) for command in commands()} for table in (RUN, READ_ONLY)]
    for command in commands():
        read_only, run = begins(command, READ_ONLY), begins(command, RUN)
        assert read_only or run, f"say in {Path(__file__).name} how this command of the README is tested: {command}"
        assert not (read_only and run), command
    assert tables[0] - {None} == set(RUN) and tables[1] - {None} == set(READ_ONLY)


@pytest.mark.filterwarnings("ignore")
def test_what_is_cheap_runs_in_the_readmes_order(checkout: Path) -> None:
    """Two trainings and their evaluations, the report, a note on a card."""
    ran = [command for command in commands() if begins(command, RUN)]
    assert len(ran) == len(RUN)
    for command in ran:
        begin = begins(command, RUN)
        assert begin is not None
        words = [*_expanded(shlex.split(command)), *RUN[begin]]
        if "external" in words:
            best = max(checkout.glob("runs/**/cards/**/*.json"), key=lambda path: read(path)["robust_accuracy"] or 0)
            words = [*words, "--card", str(best), "--robust_accuracy", "0"]
        main_of(words)(words[2:])
    assert (checkout / "runs/photos/checkpoints/best.ckpt").is_file() and (checkout / "runs/quickstart/eval/cards").is_dir()
    assert list(checkout.glob("runs/eval/robustbench/**/*.json"))
    page = (checkout / "runs/report/report.html").read_text()
    assert "tecoa_seed0" in page and "miniclip32_tecoa" in page  # cards of results/ and of runs/
    assert all(words in (checkout / "runs/examples/report.html").read_text() for words in ("attention under attack", "Against runs/eval"))


def _expanded(words: list[str]) -> list[str]:
    """As a shell would: ``runs/*`` is all that is there."""
    return [one for word in words for one in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]


@pytest.mark.parametrize("command", [command for command in commands() if begins(command, READ_ONLY)])
def test_what_is_dear_is_accepted(command: str, checkout: Path) -> None:
    """Files and keys exist; a target of make is in the Makefile."""
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
        return
    if words[:3] == ["python", "-m", "aft.submit"]:
        assert submit_command.main(["--dry-run", *words[3:]]) == 0
        return
    with pytest.raises(SystemExit) as done:
        main_of(words)([*words[2:], "--print_config"])
    assert done.value.code == 0


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.S), ids=lambda block: block.splitlines()[0])
def test_python_blocks_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As they stand."""
    exec(compile(block, "README.md", "exec"), {})
    assert "print" not in block or "tensor" in capsys.readouterr().out
