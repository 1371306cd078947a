"""aft.submit without a cluster: what is rendered, what is refused, what a script does with an exit code, and the launcher of this machine.

tests/slurm runs the same on a real SLURM.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from aft.errors import AftError, ConfigError, RunError
from aft.submit import plan
from aft.submit.__main__ import main, requested
from aft.submit.estimate import Probe
from aft.submit.settings import Resources, read_site
from aft.submit.tasks import Command, tasks_of

ROOT = Path(__file__).resolve().parents[2]
TECOA = str(ROOT / "configs" / "methods" / "tecoa.yaml")
FIT = ["--", "fit", "-c", TECOA]
PROGRAM = """
    import json, os, sys
    from pathlib import Path
    words = sys.argv[1:]
    out = Path(words[words.index("--trainer.default_root_dir" if words[0] == "fit" else "--out") + 1])
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    (out / f"{words[0]}.json").write_text(json.dumps({"words": words, "variable": os.environ.get("VARIABLE")}))
    code = int(os.environ.get("FAILS_IN", "") == out.name and words[0] == "fit" and os.environ["CODE"])
    os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    """A checkout whose programs write down what they were asked."""
    root = tmp_path / "checkout"
    for name in ("configs/methods", "configs/slurm"):
        (root / name).mkdir(parents=True)
    for method in ("tecoa", "fare"):
        (root / "configs/methods" / f"{method}.yaml").write_text("")
    (root / "configs/slurm/default.yaml").write_text("environment: {VARIABLE: 3}\n")
    for program in ("train.py", "eval.py"):
        (root / program).write_text("\n".join(line[4:] for line in PROGRAM.splitlines()))
    return root / "train.py"


def dry(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What --dry-run prints."""
    assert main(["--dry-run", *words]) == 0
    return capsys.readouterr().out


def test_the_script_is_bash_and_asks_for_what_was_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Resources, site settings and the whole command; bash can read it, and nothing was made."""
    site = str(ROOT / "configs/slurm/example.yaml")
    text = dry(capsys, "--nodes", "2", "--gpus-per-node", "8", "--time", "2-00", "--site", site, "--out", str(tmp_path / "runs"), *FIT)
    for line in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=2-00", "--signal=USR1@180", "--requeue", "--exclusive",
                 "--partition=gpu", "--cpus-per-task=8", f"--output={tmp_path}/runs/aft-%j/slurm.log", "--open-mode=append"):  # fmt: skip
        assert f"#SBATCH {line}\n" in text
    assert "module load cuda" in text and "export NCCL_SOCKET_IFNAME=ib0" in text and "/opt/aft/.venv/bin/python" in text
    assert 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"' in text
    assert '--trainer.num_nodes 2 --trainer.devices 8 --trainer.default_root_dir "$run" --ckpt_path last' in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0 and not (tmp_path / "runs").exists()


def test_an_evaluation_and_a_table_follow_a_grid(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Methods x seeds x a setting; each folder is named after what is its own. The best checkpoint is measured, or else the last."""
    text = dry(capsys, "--methods", "tecoa,fare", "--seeds", "0,1", "--vary", "model.init_args.attack.init_args.eps=1/255,4/255",
               "--at-once", "3", "--", "fit", "-c", str(ROOT / "configs/data/sample.yaml"), "--",
               "evaluate", "-c", str(ROOT / "configs/eval/apgd.yaml"))  # fmt: skip
    first, second, third = text.split("#!/bin/bash\n")[1:]
    assert "#SBATCH --array=0-7%3\n" in first and "#SBATCH --array=0-7%3\n" in second and "--array" not in third
    assert "task=fare_seed1_eps4_255;" in first and "--seed_everything=1 --model.init_args.seed=1 --data.init_args.seed=1" in first
    assert "checkpoints/best.ckpt" in second and third.count("/eval/cards") == 8
    (case,) = [line for line in first.splitlines() if "task=fare_seed0_eps1_255;" in line]
    assert case.index("methods/fare.yaml") < case.index("data/sample.yaml") < case.index("--seed_everything=0")  # the later wins
    for script in (first, second, third):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    (choice,) = [line for line in second.splitlines() if line.startswith("weights=")]
    (tmp_path / "checkpoints").mkdir()
    for name in ("last", "best"):
        (tmp_path / "checkpoints" / f"{name}.ckpt").touch()
        chosen = subprocess.run(["bash"], input=f'run={tmp_path}; {choice}; echo "$weights"', capture_output=True, text=True)
        assert chosen.stdout == f"{tmp_path}/checkpoints/{name}.ckpt\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "there is no command"),
        (["--nodse", "2", *FIT], "unknown option '--nodse': did you mean '--nodes'"),
        (["--node", "2", *FIT], "unknown option '--node': did you mean '--nodes'"),
        (["--", "fitt"], "did you mean 'fit'"),
        (["--nodes", "0", *FIT], "--nodes 0 is below 1"),
        (["--gpus-per-node", "-1", *FIT], "--gpus-per-node -1 is below 0"),
        (["--gpus-per-node", "4", "--tasks-per-node", "2", *FIT], "each has one process"),
        (["--time", "soon", *FIT], "--time soon is no time"),
        (["--seeds", "a", *FIT], "invalid numbers value"),
        (["--name", "bash", *FIT], "Lightning does not see SLURM"),
        (["--name", "interactive", *FIT], "Lightning does not see SLURM"),
        (["--name", "a/b", *FIT], "use letters, digits"),
        (["--site", "nowhere.yaml", *FIT], "there is no such file"),
        (["--entry", "nowhere/train.py", *FIT], "there is no .*nowhere/train.py"),
        (["--methods", "tecao", *FIT], "unknown method 'tecao': did you mean 'tecoa'"),
        (["--methods", "tecoa", "--", "evaluate"], "--methods is for fit"),
        (["--seeds", "1,1", *FIT], "two tasks would share a folder: seed1"),
        (["--vary", "lr", *FIT], "write KEY=VALUE,VALUE"),
        ([*FIT, "--ckpt_path", "last"], "--ckpt_path: aft.submit sets this option itself"),
        ([*FIT, "--trainer.default_root_dir=x"], "aft.submit sets this option itself"),
        (["--", "evaluate", "--", "evaluate"], "a second command measures"),
        ([*FIT, "--", "evaluate", "--", "report"], "3 commands after --"),
        (["--at-once", "0", *FIT], "--at-once 0 is below 1"),
        (["--resume", "nowhere", *FIT], "there is no readable job.json"),
        (["--", "fit", "-c", "configs/methods/tecao.yaml"], r"-c /.*/configs/methods/tecao.yaml: .*did you mean 'tecoa.yaml'"),
        (["--local", "--", "fit", "--config=a.yaml"], r"--config /.*/a.yaml: unknown file 'a.yaml'"),
        ([*FIT, "--", "evaluate", "-c", "b.yaml"], r"-c /.*/b.yaml: unknown file 'b.yaml'"),
    ],
)
def test_bad_arguments_are_named(words: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came, what is allowed, what to do; before SLURM is asked, or missed: there is none here."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AftError, match=told):
        main(words)


@pytest.mark.parametrize(
    ("text", "told"),
    [("partitoin: gpu", "did you mean 'partition'"), ("notice: soon", "notice = 'soon' is no int"), ("notice: 0", "notice = 0 is below 1"),
     ("gpus: gress", "did you mean 'gres'"), ("setup: module load", "is no list"), ("- a", "holds no settings")],
)  # fmt: skip
def test_a_site_file_says_what_is_wrong_with_it(tmp_path: Path, text: str, told: str) -> None:
    """With the file's name."""
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"site.yaml.*{told}"):
        read_site(tmp_path / "site.yaml")


def test_every_shipped_site_file_is_read() -> None:
    """And the example names every setting."""
    files = sorted((ROOT / "configs" / "slurm").glob("*.yaml"))
    assert [read_site(path).notice for path in files] and {path.name for path in files} == {"default.yaml", "example.yaml"}
    site = read_site(ROOT / "configs/slurm/example.yaml")
    assert all(value for value in vars(site).values())


def test_no_slurm_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Said with the ways out."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match=r"there is no sbatch on this machine.*--local.*--dry-run"):
        main(["--out", str(tmp_path), *FIT])


def test_the_folder_of_another_run_is_refused(entry: Path, tmp_path: Path) -> None:
    """Going on with another command in it; without a command it goes on with its own."""
    _, request = requested(["--entry", str(entry), "--out", str(tmp_path), "--seeds", "1,2", *FIT])
    folder = tmp_path / "aft-7"
    folder.mkdir()
    plan.keep(folder, plan.RECORD, json.dumps(request.record({"first": "7"})))
    _, other = requested(["--entry", str(entry), "--resume", str(folder), *FIT, "--seed_everything", "3"])
    with pytest.raises(RunError, match=r"folder of another run \(command, seeds, tasks differ"):
        plan.check_folder(folder, other)
    _, same = requested(["--entry", str(entry), "--resume", str(folder)])
    assert same.tasks() == request.tasks() and same.here == request.here


FAKES = {
    "srun": 'echo "srun $*" >> "$CALLS"; case "$*" in *--overlap*) exit "$NODES" ;; *) exit "$CODE" ;; esac',
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; kill $PPID',
    "squeue": 'case "$*" in *RestartCnt*) echo "  $COUNT  " ;; *) echo "$STATE" ;; esac',
}


@pytest.mark.parametrize(
    ("code", "state", "nodes", "restarts", "count", "end", "queued"),
    [
        (0, "RUNNING", 0, 0, 0, "aft: done", False),
        (138, "RUNNING", 0, 0, 0, "aft: requeue: stopped by a signal", True),
        (143, "RUNNING", 0, 3, 3, "aft: requeue: stopped by a signal", True),
        (143, "CANCELLED", 0, 0, 0, "stopped by a signal (state CANCELLED)", False),  # somebody's scancel must stay one
        (1, "RUNNING", 0, 0, 0, "aft: failed with exit code 1", False),
        (1, "RUNNING", 1, 0, 0, "aft: requeue: a node does not answer", True),
        (138, "RUNNING", 0, 50, 50, "queued again 50 times already", False),
        (143, "RUNNING", 0, 0, 1, "this start was given up, the job runs again elsewhere", False),  # by a script that outlived its node
        (1, "RUNNING", 1, 0, "", "aft: requeue: a node does not answer", True),  # a SLURM that does not tell the count
    ],
)
def test_exit_codes_tell_done_requeue_and_failed(
    tmp_path: Path, entry: Path, capsys: pytest.CaptureFixture[str], code: int, state: str, nodes: int, restarts: int,
    count: int | str, end: str, queued: bool,
) -> None:
    """The script as it is rendered, with stand-ins for SLURM's programs."""
    script = dry(capsys, "--nodes", "2", "--entry", str(entry), "--out", str(tmp_path / "runs"), *FIT)
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n",
                   "SLURM_RESTART_COUNT": str(restarts), "CALLS": str(tmp_path / "calls"), "CODE": str(code), "STATE": state,
                   "COUNT": str(count), "NODES": str(nodes)}  # fmt: skip
    done = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True)
    calls = (tmp_path / "calls").read_text()
    assert end in done.stdout and (tmp_path / "runs" / "aft-7").is_dir(), done.stderr
    assert ("scontrol requeue 7" in calls) == queued
    assert queued or done.returncode == code
    assert "export MASTER_PORT=" in script and "export MASTER_PORT" not in dry(capsys, "--entry", str(entry), "--", "evaluate")
    assert f"{entry} fit -c {TECOA} --trainer.num_nodes 2" in calls and "--kill-on-bad-exit=1" in calls


def test_the_same_job_runs_without_a_cluster(entry: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """--local: every task trains and is measured in a folder of its own, then the table; --resume goes on in it."""
    words = ["--local", "--entry", str(entry), "--out", str(tmp_path / "runs"), "--gpus-per-node", "0", "--seeds", "0,1", *FIT,
             "--", "evaluate", "--n", "5"]  # fmt: skip
    folder = tmp_path / "runs" / "aft-local-1"
    assert main(words) == 0 and main(["--local", "--entry", str(entry), "--gpus-per-node", "0", "--resume", str(folder)]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["aft-local-1"]
    trained = json.loads((folder / "seed1" / "fit.json").read_text())
    assert trained["variable"] == "3" and trained["words"][-2:] == ["--ckpt_path", "last"] and "--trainer.accelerator" in trained["words"]
    measured = json.loads((folder / "seed1" / "eval" / "evaluate.json").read_text())["words"]
    assert json.loads(measured[measured.index("--models") + 1]) == {"seed1": {"pretrained": f"{folder}/seed1/checkpoints/best.ckpt"}}
    assert (folder / "report.json").is_file()
    with pytest.raises(RunError, match="folder of another run"):
        main(["--local", "--entry", str(entry), "--gpus-per-node", "0", "--resume", str(folder), *FIT, "--seed_everything", "3"])
    with pytest.raises(ConfigError, match="this machine is one node"):
        main(["--local", "--nodes", "2", *FIT])


@pytest.mark.parametrize(("given", "code", "others"), [(1, 1, True), (143, 143, False), (-signal.SIGKILL, 137, False)])
def test_a_local_task_that_fails_is_not_measured(
    entry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: int, code: int, others: bool
) -> None:
    """The others go on; after a signal, handled or not, nothing does. The exit code is the task's."""
    monkeypatch.setenv("FAILS_IN", "seed0")
    monkeypatch.setenv("CODE", str(given))
    words = ["--local", "--entry", str(entry), "--out", str(tmp_path), "--seeds", "0,1", *FIT, "--", "evaluate"]
    assert main(words) == code
    folder = tmp_path / "aft-local-1"
    assert not (folder / "seed0" / "eval").exists() and (folder / "seed1" / "eval").exists() == others
    assert not (folder / "report.json").exists()


def test_ctrl_c_is_the_command_s_to_handle(entry: Path, tmp_path: Path) -> None:
    """The launcher waits until the training has saved, and ends with its code."""
    entry.write_text(textwrap.dedent(f"""
        import signal, sys, time
        from pathlib import Path
        def save(*_):
            time.sleep(0.5)
            Path({str(tmp_path / "saved")!r}).touch()
            sys.exit(130)
        signal.signal(signal.SIGINT, save)
        Path({str(tmp_path / "ready")!r}).touch()
        time.sleep(60)
    """))
    command = [sys.executable, "-m", "aft.submit", "--local", "--entry", str(entry), "--out", str(tmp_path / "runs"), *FIT]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, and so these tests, may ignore it
    launcher = subprocess.Popen(command, cwd=ROOT, start_new_session=True, preexec_fn=heard)
    while not (tmp_path / "ready").is_file():
        assert launcher.poll() is None
        time.sleep(0.05)
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(60) == 130 and (tmp_path / "saved").is_file()


def test_a_local_folder_that_cannot_be_made_is_named(entry: Path, tmp_path: Path) -> None:
    """A file is in its place."""
    with pytest.raises(RunError, match=r"--out .*train.py/runs cannot be made .*choose a folder that you can write to"):
        main(["--local", "--entry", str(entry), "--out", str(entry / "runs"), *FIT])


def test_an_estimate_is_from_a_short_run_and_leaves_nothing(
    entry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process, validation off, a folder of its own that is removed; hours for all tasks, and what they rest on."""
    told = {"seconds": 2.0, "timed": 15, "images": 64, "steps": 1800, "fixed": False}
    probing = f"""
        import json, sys
        from pathlib import Path
        words = sys.argv[1:]
        assert "--trainer.callbacks+=callbacks.Probe" in words and words[-2] == "--trainer.default_root_dir", words
        assert "--trainer.devices=1" in words and "--trainer.num_nodes=1" in words and "--trainer.limit_val_batches=0" in words, words
        (Path(words[-1]) / "probe.json").write_text({json.dumps(json.dumps(told))})
    """
    entry.write_text(textwrap.dedent(probing))
    words = ["--estimate", "--local", "--entry", str(entry), "--out", str(tmp_path / "runs"), "--gpus-per-node", "4"]
    assert main([*words, "--seeds", "0,1", *FIT]) == 0
    said = capsys.readouterr().out
    assert "2 s a step of 64 images (median of 15 steps on one process)" in said
    assert "1 GPU-hours a task on 4 processes, 0.25 h; 2 GPU-hours for 2 tasks" in said and list((tmp_path / "runs").iterdir()) == []
    with pytest.raises(ConfigError, match="--estimate is for fit"):
        main([*words, "--", "evaluate"])
    entry.write_text(entry.read_text() + "sys.exit('ended badly after all')\n")
    with pytest.raises(RunError, match="the probe of twenty steps failed:\nended badly after all"):
        main([*words, *FIT])
    entry.write_text("import sys; sys.exit('no such data')")
    with pytest.raises(RunError, match="the probe of twenty steps failed:\nno such data"):
        main([*words, *FIT])


def test_hours_of_a_run_follow_from_its_steps() -> None:
    """2 s a step, 1,800 steps on one process: one hour; shared by 4 processes it is the same GPU time; with the steps given, 4 times."""
    assert Probe(2.0, 15, 64, 1800, fixed=False).hours(4) == 1.0
    assert Probe(2.0, 15, 64, 1800, fixed=True).hours(4) == 4.0


def test_one_task_has_no_name() -> None:
    """Its folder is the job's."""
    (task,) = tasks_of(Command(("fit", "-c", "a.yaml")), [], [], [], ROOT / "configs")
    assert task.name == "" and task.words == ("fit", "-c", "a.yaml")
    assert Resources(gpus_per_node=0, tasks_per_node=3).processes == 3


def test_submitting_needs_no_torch() -> None:
    """A login node answers at once: neither torch nor Lightning is imported."""
    code = "import sys, aft.submit.__main__; sys.exit(bool({'torch', 'lightning'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
