"""Talks to SLURM: one job after the other, held until its folder is there."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from aft.errors import RunError


def need_slurm() -> None:
    """Raises RunError where there is no SLURM."""
    if shutil.which("sbatch") is None:
        raise RunError("there is no sbatch on this machine: submit from a login node of the cluster, run here with --local, or look at the "
                       "script with --dry-run.")  # fmt: skip


def try_out(script: str) -> None:
    """Asks whether the cluster could ever run this; nothing is submitted.

    Raises:
        RunError: it could not (too many nodes, no such partition or account ...).
    """
    done = _sbatch(script, ["--test-only"])
    if done.returncode:
        why = _last_line(done.stderr)
        raise RunError(f"the cluster cannot give this job what it asks for ({why}); nothing was submitted. See sinfo for partitions "
                       "and their nodes; --nodes, --gpus-per-node, --time and the site file say what is asked for.")  # fmt: skip


def submit(script: str, more: Sequence[str] = ()) -> str:
    """Submits a script; its job id.

    Raises:
        RunError: it was refused.
    """
    done = _sbatch(script, ["--parsable", *more])
    if done.returncode:
        raise RunError(f"sbatch refused the job ({_last_line(done.stderr)}).")
    return done.stdout.strip().partition(";")[0]


def release(job: str) -> None:
    """Lets a held job start.

    Raises:
        RunError: it does not.
    """
    done = subprocess.run(["scontrol", "release", job], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"job {job} is held and could not be released ({_last_line(done.stderr)}): look at scontrol show job {job}.")


def cancel(jobs: Sequence[str]) -> None:
    """Takes jobs back."""
    if jobs:
        subprocess.run(["scancel", *jobs], capture_output=True)


def is_active(job: str) -> bool:
    """Whether a job waits or runs."""
    done = subprocess.run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True)
    return done.returncode == 0 and bool(done.stdout.strip())


def _sbatch(script: str, options: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sbatch", *options], input=script, capture_output=True, text=True)


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].removeprefix("sbatch: ").removeprefix("error: ") or "no reason given"
