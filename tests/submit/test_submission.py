"""What aft.submit says to SLURM, with stand-ins for its programs: everything is submitted, held until it is whole, or nothing is."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from aft.errors import RunError
from aft.submit.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
FIT = ["--", "fit", "-c", str(ROOT / "configs/methods/tecoa.yaml")]
PROGRAMS = {  # job numbers count the submissions; REFUSE names the call that fails
    "sbatch": 'cat > /dev/null; case "$*" in *--test-only*) ;; *) printf x >> "$CALLS.n"; echo $((100 + $(wc -c < "$CALLS.n"))) ;; esac',
    "scontrol": "", "scancel": "", "squeue": 'echo "$ACTIVE"',
}  # fmt: skip


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of all calls, one a line."""
    for name, body in PROGRAMS.items():
        refuse = f'if [[ "{name} $*" == $REFUSE ]]; then echo "{name}: error: no" >&2; exit 1; fi'
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{refuse}\n{body}\n')
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, value in {"CALLS": str(tmp_path / "calls"), "REFUSE": "nothing", "ACTIVE": ""}.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "calls"


def words(tmp_path: Path, *more: str) -> list[str]:
    """A training with its evaluation."""
    return ["--out", str(tmp_path / "runs"), *more, *FIT, "--", "evaluate", "-c", str(ROOT / "configs/eval/apgd.yaml")]


def test_jobs_wait_for_each_other_and_the_first_for_its_folder(calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked first whether the cluster could; held, with what it must wait for; each task measured once it is trained, then the table."""
    assert main(words(tmp_path, "--seeds", "0,1", "--after", "7,8")) == 0
    assert calls.read_text().splitlines() == [
        "sbatch --test-only",
        "sbatch --parsable --hold --dependency=afterok:7:8",
        "sbatch --parsable --dependency=aftercorr:101 --kill-on-invalid-dep=yes",
        "sbatch --parsable --dependency=afterany:102",
        "scontrol release 101",
    ]
    folder = tmp_path / "runs" / "aft-101"
    assert json.loads((folder / "job.json").read_text())["jobs"] == {"first": "101", "evaluation": "102", "report": "103"}
    assert {path.name for path in folder.iterdir()} == {"job.json", "submit.sh", "evaluate.sh", "report.sh"}
    said = capsys.readouterr().out
    assert said.startswith(f"job 101: 2 tasks, folder {folder}") and f"go on: python -m aft.submit --resume {folder}" in said
    assert f"tail -F {folder}/slurm-0.log" in said and "scancel 101 102 103" in said


@pytest.mark.parametrize(
    ("refused", "told", "cancelled"),
    [
        ("sbatch --test-only", "the cluster cannot give this job what it asks for", ""),
        ("*--hold*", "sbatch refused the job", ""),
        ("*--kill-on-invalid-dep*", "sbatch refused the job", "scancel 101"),
        ("*afterany*", "sbatch refused the job", "scancel 101 102"),
        ("scontrol release*", "job 101 is held and could not be released", "scancel 101 102 103"),
    ],
)
def test_what_is_refused_leaves_no_job_behind(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, told: str, cancelled: str
) -> None:
    """Whichever part it is, those before it are taken back."""
    monkeypatch.setenv("REFUSE", refused)
    with pytest.raises(RunError, match=f"{told}.*no"):
        main(words(tmp_path))
    assert [line for line in calls.read_text().splitlines() if line.startswith("scancel")] == ([cancelled] if cancelled else [])


def test_a_folder_that_cannot_be_made_is_said_and_no_job_is_left(calls: Path, tmp_path: Path) -> None:
    """Its name holds the job's number, so it comes after the (held) job."""
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"runs/aft-101 cannot be written .*choose a folder that all nodes see"):
        main(words(tmp_path))
    assert calls.read_text().splitlines()[-1] == "scancel 101"


def test_a_folder_is_gone_on_with_by_its_own_command_when_it_is_free(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the same folder; not while a job of it waits or runs, and not by another command: nothing is submitted then."""
    main(words(tmp_path))
    folder = tmp_path / "runs" / "aft-101"
    calls.unlink()
    monkeypatch.setenv("ACTIVE", "RUNNING")
    with pytest.raises(RunError, match="job 101, 102, 103 of .* still waits or runs"):
        main(["--resume", str(folder)])
    monkeypatch.setenv("ACTIVE", "")
    with pytest.raises(RunError, match="folder of another run"):
        main(["--resume", str(folder), *FIT, "--seed_everything", "3"])
    assert "sbatch" not in calls.read_text()
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)  # its relative paths start from where it was first given
    assert main(["--resume", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"job 104: 1 task, folder {folder}")
    record = json.loads((folder / "job.json").read_text())
    assert record["jobs"]["first"] == "104" and record["here"] != str(tmp_path)
    assert "sbatch --parsable --dependency=afterok:104 --kill-on-invalid-dep=yes" in calls.read_text()
