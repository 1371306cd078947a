"""Training and evaluation as real jobs on a real SLURM of two nodes: signals, lost nodes, arrays."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.slurm.cluster import Cluster, until

ROOT = Path(__file__).resolve().parents[2]
EPOCH = 10  # steps: 400 images, 20 a process and step
STEPS = 2 * EPOCH
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def recipe(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TeCoA on the tiny model, with an average of the weights; and the cluster's site file beside it."""
    folder = tmp_path_factory.mktemp("recipe")
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    settings["model"]["init_args"] |= {
        "clip": {"pretrained": str(tiny_folder)}, "val_attack": None,
        "attack": {"class_path": "aft.attacks.PGD", "init_args": {"eps": "8/255", "step_size": "4/255", "steps": 1}},
        "optimizer": {"name": "adamw", "lr": 0.001, "warmup_steps": 4},
    }  # fmt: skip
    settings["data"]["init_args"] = {"batch_size": 20, "holdout": 0, "train_classes": ["cat", "dog"], "augment": "crop_flip"}
    settings["data"]["class_path"] = "datamodules.Sample"
    settings["trainer"] = {"max_steps": STEPS, "max_epochs": -1, "log_every_n_steps": 1}
    settings["checkpoint"] = {"monitor": None}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    site = {"environment": {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}, "notice": 30}
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    return folder


def submit(cluster: Cluster, *words: object) -> tuple[str, Path]:
    """``python -m aft.submit``; the first job's id and its folder."""
    command = [sys.executable, "-m", "aft.submit", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    return first.split()[1].rstrip(":"), Path(first.rpartition("folder ")[2])


def train(cluster: Cluster, recipe: Path, out: Path, *more: object, minutes: int = 10) -> tuple[str, Path]:
    """A training across both nodes, one process on each."""
    seen = out / "seen"
    seen.mkdir(parents=True)
    return submit(cluster, "--nodes", 2, "--gpus-per-node", 0, "--time", minutes, "--out", out, "--site", recipe / "site.yaml", "--",
                  "fit", "-c", recipe / "tiny.yaml", "--trainer.callbacks+=callbacks.AveragedWeights",
                  "--trainer.callbacks+=tests.slurm.recorder.Recorder", f"--trainer.callbacks.folder={seen}", *more)  # fmt: skip


def reached(out: Path, step: int) -> bool:
    """Whether rank 0 is in a step beyond this one."""
    path = out / "seen" / "pid-0"
    return path.is_file() and int((path.read_text() or "0 0").split()[1]) >= step


def pid(out: Path, rank: int) -> int:
    """Of a rank's process."""
    return int((out / "seen" / f"pid-{rank}").read_text().split()[0])


def running(pid: int) -> bool:
    """Whether this process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def log(folder: Path) -> str:
    """What the job said."""
    return (folder / "slurm.log").read_text()


def samples(out: Path) -> dict[int, list[int]]:
    """Step -> all samples of it; a step that was made twice must have had the same ones."""
    found: dict[tuple[int, int], list[int]] = {}
    for rank in (0, 1):
        for line in (out / "seen" / f"seen-{rank}.jsonl").read_text().splitlines():
            told = json.loads(line)
            assert found.setdefault((told["step"], rank), told["index"]) == told["index"]
    return {step: found[step, 0] + found[step, 1] for step, rank in found if rank == 0}


def check_same(folder: Path, whole: Path) -> None:
    """Weights, their average, the optimiser's moments and the schedule: equal to the bit."""
    one, other = (torch.load(place / "checkpoints" / "last.ckpt", weights_only=True) for place in (folder, whole))
    assert one["global_step"] == other["global_step"] == STEPS
    for key in ("state_dict", "averaged_weights", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)


def check_each_sample_once(out: Path) -> None:
    """In every epoch."""
    seen = samples(out)
    assert sorted(seen) == list(range(1, STEPS + 1))
    for epoch in range(STEPS // EPOCH):
        indices = [index for step in range(EPOCH * epoch + 1, EPOCH * (epoch + 1) + 1) for index in seen[step]]
        assert len(indices) == len(set(indices)) == 2 * 20 * EPOCH


def logged_steps(folder: Path) -> list[int]:
    """The steps under which the loss was logged, over all starts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted((folder / "tensorboard").glob("events*"), key=lambda path: path.stat().st_mtime)
    return [event.step for file in files for event in EventAccumulator(str(file)).Reload().Scalars("train/loss")]


@pytest.fixture(scope="module")
def whole(cluster: Cluster, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run across both nodes."""
    out = tmp_path_factory.mktemp("whole")
    job, folder = train(cluster, recipe, out)
    assert cluster.wait(job, 600) == "COMPLETED", log(folder)
    check_each_sample_once(out)
    assert folder.name == f"aft-{job}" and "on n[1-2]" in log(folder)
    return folder


def test_three_signals_and_an_uninterrupted_run_end_alike(cluster: Cluster, recipe: Path, whole: Path, tmp_path: Path) -> None:
    """SIGUSR1 to all, SIGTERM to one rank alone, SIGUSR1 again, at random steps: each start ends with a checkpoint and is queued again."""
    choose = random.Random(0)
    job, folder = train(cluster, recipe, tmp_path, "--trainer.callbacks.pause=0.3")
    for turn, (first, last) in enumerate([(2, 5), (8, 11), (14, 16)]):
        step = choose.randint(first, last)
        until(lambda step=step: reached(tmp_path, step), 300, f"in step {step}")
        began = time.monotonic()
        if turn == 1:
            os.kill(pid(tmp_path, 1), signal.SIGTERM)
        else:
            cluster.run("scancel", "--signal=USR1", job)
        until(lambda count=turn + 1: cluster.restarts(job) == count, 60, "queued again")
        assert time.monotonic() - began < 60
        saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
        assert f"stopped after step {saved}" in log(folder)
        until(lambda: cluster.state(job) == "RUNNING", 60, "running again")
    assert cluster.wait(job, 400) == "COMPLETED", log(folder)
    check_same(folder, whole)
    check_each_sample_once(tmp_path)
    assert logged_steps(folder) == logged_steps(whole) == list(range(STEPS))
    assert log(folder).count("aft: start") == 4 and [path.name for path in folder.glob("config*.yaml")] == ["config.yaml"]


def test_a_lost_node_costs_nothing_but_time(cluster: Cluster, recipe: Path, whole: Path, tmp_path: Path) -> None:
    """All of n2 is killed at once, no signal reaches anybody; the job is queued again, goes on from the last save and ends the same."""
    keep = ("--trainer.callbacks+=callbacks.KeepSaving", "--trainer.callbacks.every_n_steps=2")
    job, folder = train(cluster, recipe, tmp_path, "--trainer.callbacks.pause=0.3", *keep)
    until(lambda: reached(tmp_path, 7), 300, "in step 7")
    assert len(cluster.lose_node("n2")) >= 3  # slurmd, slurmstepd, the process that trains
    until(lambda: cluster.nodes_in("down") + cluster.nodes_in("down*") or cluster.restarts(job), 120, "n2 is missed")
    cluster.start_node("n2")
    until(lambda: cluster.restarts(job) >= 1, 120, "queued again")
    assert cluster.wait(job, 400) == "COMPLETED", log(folder)
    check_same(folder, whole)
    check_each_sample_once(tmp_path)


@pytest.mark.skipif("AFT_STRESS" not in os.environ, reason="a second start may be ended by a late message meant for the first, and is "
                    "queued again: minutes; make stress does it")
def test_a_rank_that_outlives_its_node_writes_no_more(cluster: Cluster, recipe: Path, whole: Path, tmp_path: Path) -> None:
    """The node of the job's script is lost, but for rank 0, which is about to save: the job comes back, and the old rank is refused."""
    callbacks = ("--trainer.callbacks+=callbacks.KeepSaving", "--trainer.callbacks.every_n_steps=2",
                 "--trainer.callbacks+=tests.slurm.recorder.Survivor", f"--trainer.callbacks.place={tmp_path}",
                 "--trainer.callbacks.step=7")  # fmt: skip
    job, folder = train(cluster, recipe, tmp_path, "--trainer.callbacks.pause=0.3", *callbacks)
    until((tmp_path / "waits").is_file, 300, "in the save after step 7")
    old = pid(tmp_path, 0)
    try:
        killed = cluster.lose_node("n1", spared=old)
        assert len(killed) >= 4 and old not in killed  # slurmd, slurmstepd of script and of step, the script
        until(lambda: cluster.nodes_in("down") + cluster.nodes_in("down*") or cluster.restarts(job), 120, "n1 is missed")
        cluster.start_node("n1")
        until(lambda: pid(tmp_path, 0) != old and reached(tmp_path, 8), 300, "beyond step 7 in the second start")
        assert running(old)
        (tmp_path / "go").touch()
        until(lambda: not running(old), 60, "the old rank has ended")
    finally:
        if running(old):
            os.kill(old, signal.SIGKILL)
    assert re.match(r"RunError: the run in .* was started again", (tmp_path / "outcome").read_text())
    assert cluster.wait(job, 400) == "COMPLETED", log(folder)
    assert cluster.restarts(job) >= 1  # SLURM may end the second start itself, by a message that was meant for the first
    assert f"process {old} on" in log(folder) and "it will write nothing more here" in log(folder)
    assert "forcing job termination" not in log(folder)  # srun had no time to tell anybody
    check_same(folder, whole)
    check_each_sample_once(tmp_path)


@pytest.mark.skipif("AFT_STRESS" not in os.environ, reason="waits for a real time limit, about four minutes; make stress does")
def test_a_job_at_its_time_limit_goes_on(cluster: Cluster, recipe: Path, whole: Path, tmp_path: Path) -> None:
    """Two minutes a start, for a run that takes longer: SLURM's own signal comes first, the job is queued again and ends the same.

    (SLURM looks every 30 s and sends it up to 60 s early; with a limit of one minute it would come before the first step.)
    """
    job, folder = train(cluster, recipe, tmp_path, "--trainer.callbacks.pause=5", minutes=2)
    assert cluster.wait(job, 600) == "COMPLETED", log(folder)
    assert cluster.restarts(job) >= 1 and log(folder).count("SIGUSR1: stopped after step") == cluster.restarts(job)
    check_same(folder, whole)
    check_each_sample_once(tmp_path)


def test_methods_and_seeds_then_their_evaluation_then_one_table(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    """One command: an array of trainings, each task's evaluation after it, and a table over all of them."""
    small = yaml.safe_load((recipe / "tiny.yaml").read_text())
    del small["model"]["class_path"], small["model"]["init_args"]["attack"], small["model"]["init_args"]["optimizer"]
    small["model"]["init_args"]["clip"] = {"name": "miniclip32", "pretrained": None}
    small["data"]["init_args"]["batch_size"], small["trainer"]["max_steps"] = 2, 1
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    job, folder = submit(cluster, "--gpus-per-node", 0, "--time", 10, "--out", tmp_path, "--site", recipe / "site.yaml", "--name", "grid",
                         "--methods", "tecoa,fare", "--seeds", "0,1", "--", "fit", "-c", tmp_path / "small.yaml", "--",
                         "evaluate", "--data", "datamodules.Sample", "--protocols", "[clean]", "--n", 20, "--device", "cpu")  # fmt: skip
    jobs = json.loads((folder / "job.json").read_text())["jobs"]
    ended = cluster.wait(jobs["report"], 900)
    assert jobs["first"] == job and ended == "COMPLETED", "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))
    names = ["tecoa_seed0", "tecoa_seed1", "fare_seed0", "fare_seed1"]
    assert all((folder / name / "checkpoints" / "last.ckpt").is_file() for name in names)
    table = (folder / "report.log").read_text()
    assert all(name in table for name in names) and (folder / "table.csv").is_file()


def test_an_estimate_is_a_short_job(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    """Twenty steps on one process of one node; the hours are those of both, and nothing is left."""
    command = [sys.executable, "-m", "aft.submit", "--nodes", "2", "--gpus-per-node", "0", "--estimate", "--out", str(tmp_path / "runs"),
               "--site", str(recipe / "site.yaml"), "--", "fit", "-c", str(recipe / "tiny.yaml")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"s a step of 20 images \(median of 15 steps on one process\)\nestimate: .* a task on 2 processes", done.stdout)
    assert "aft-probe" in cluster.run("squeue", "--noheader", "--states=all", "--format=%j") and list((tmp_path / "runs").iterdir()) == []


def test_what_cannot_run_is_refused_before_it_is_submitted(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    """More nodes than there are: SLURM's own word is passed on, no job is made, and no folder."""
    command = [sys.executable, "-m", "aft.submit", "--nodes", "9", "--gpus-per-node", "0", "--out", str(tmp_path / "runs"), "--site",
               str(recipe / "site.yaml"), "--", "fit", "-c", str(recipe / "tiny.yaml")]  # fmt: skip
    before = cluster.run("squeue", "--noheader", "--states=all", "--format=%A")
    done = subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode == 1 and "the cluster cannot give this job what it asks for" in done.stderr, done.stderr
    assert "nothing was submitted" in done.stderr
    assert cluster.run("squeue", "--noheader", "--states=all", "--format=%A") == before and not (tmp_path / "runs").exists()
