"""The job's script: plain bash that a person can read, change and submit again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from aft.submit.settings import Resources, Site
from aft.submit.tasks import Task

#: The folder of a job that is about to get its number.
BY_NUMBER = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"
STOPPED = (138, 143)  # 128 + SIGUSR1, 128 + SIGTERM: what train.py ends with after a checkpoint
ENDING = r"""
# 0: done. 138, 143: stopped by SIGUSR1, SIGTERM, with a checkpoint. All else: failed, unless a node was lost.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; job=${job:-$SLURM_JOB_ID}
again() {
    now=$(squeue --noheader --jobs="$job" --Format=RestartCnt | tr -cd 0-9)   # a script that outlived its node must not stop the next start
    if [ "${now:-$restarts}" != "$restarts" ]; then echo "aft: this start was given up, the job runs again elsewhere"; exit "$code"; fi
    if [ "$restarts" -ge "$most" ]; then echo "aft: failed: $1, and this job was queued again $restarts times already"; exit "$code"; fi
    echo "aft: requeue: $1"
    scontrol requeue "$job" || exit "$code"
    sleep 600; exit "$code"   # SLURM ends this script
}
case $code in
    0) echo "aft: done"; exit 0 ;;
    138|143)
        # A job that was cancelled, or that SLURM preempts and queues again by itself, is no longer RUNNING.
        state=$(squeue --noheader --jobs="$job" --format=%T)
        [ "$state" = RUNNING ] && again "stopped by a signal"
        echo "aft: stopped by a signal (state ${state:-unknown})"; exit "$code" ;;
esac
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then   # a lost node sends no signal: the other processes fail
    timeout 60 srun --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true || again "a node does not answer"
fi
echo "aft: failed with exit code $code"; exit "$code"
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One submission, an array where it has several tasks.

    Args:
        name: of the job.
        tasks: what runs.
        program: ``train.py`` or ``eval.py`` with its absolute path.
        python: the interpreter.
        here: where the command was given, which its relative paths start from.
        folder: where everything of the job goes; may hold shell variables.
        log: pattern of the log's path, for ``sbatch``.
        resources, site: what it asks for.
        measures: whether it measures the checkpoints that another job left in the tasks' folders.
        at_once: tasks of an array that run together; none: all.
    """

    name: str
    tasks: Sequence[Task]
    program: str
    python: str
    here: str
    folder: str
    log: str
    resources: Resources
    site: Site
    measures: bool = False
    at_once: int | None = None

    @property
    def trains(self) -> bool:
        """Whether it is a training: it then has processes that work together."""
        return self.tasks[0].words[0] == "fit"


def options(job: Job) -> list[str]:
    """What stands behind ``#SBATCH``."""
    site, asked = job.site, job.resources
    lines = [f"--job-name={job.name}", f"--nodes={asked.nodes}", f"--ntasks-per-node={asked.processes}", f"--time={asked.time}",
             f"--output={job.log}", "--open-mode=append", "--requeue", f"--signal=USR1@{site.notice}"]  # fmt: skip
    if asked.gpus_per_node:
        lines.append(f"--gres=gpu:{asked.gpus_per_node}" if site.gpus == "gres" else f"--gpus-per-node={asked.gpus_per_node}")
    for option in ("partition", "account", "qos", "constraint", "cpus_per_task", "mem_per_cpu"):
        if (value := getattr(site, option)) is not None:
            lines.append(f"--{option.replace('_', '-')}={value}")
    if len(job.tasks) > 1:
        lines.append(f"--array=0-{len(job.tasks) - 1}" + (f"%{job.at_once}" if job.at_once else ""))
    return lines + site.sbatch


def render(job: Job) -> str:
    """The whole script."""
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options(job)), "set -uo pipefail"]
    lines += ["restarts=${SLURM_RESTART_COUNT:-0}", f"most={job.site.max_requeues}"]
    lines += [f"cd {shlex.quote(job.here)} || exit 1", f'folder="{job.folder}"']
    lines += job.site.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in job.site.environment.items()]
    if job.site.cpus_per_task is not None:
        lines.append('export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"   # srun no longer takes it from sbatch by itself')
    if job.trains:
        lines.append("# Another port at every start: a process of the one before may still hold its own.")
        lines.append('export MASTER_PORT="${MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 64 + restarts) % 12000))}"')
    lines += chosen_task(job)
    lines += ['mkdir -p "$run" || exit 1', 'echo "aft: start $((restarts + 1)) on $SLURM_JOB_NODELIST, run folder $run"']
    start = " ".join(["srun", "--kill-on-bad-exit=1", *map(shlex.quote, job.site.srun)])
    command = f"{shlex.quote(job.python)} {shlex.quote(job.program)}"
    if job.trains:
        lines += [f'{start} {command} "${{words[@]}}" {training_options(job.resources)}']
    else:
        lines += ["# Processes share the images without talking to each other: each is told which of them it is.",
                  f"{start} bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec \"$@\"' process \\",
                  f'    {command} "${{words[@]}}" --out "$run/eval"']  # fmt: skip
    return "\n".join([*lines, "code=$?"]) + "\n" + ENDING.lstrip("\n")


def training_options(asked: Resources) -> str:
    """The options of ``train.py`` that follow from the job."""
    place = "" if asked.gpus_per_node else "--trainer.accelerator cpu "
    place += f"--trainer.num_nodes {asked.nodes} --trainer.devices {asked.processes}"
    return f'{place} --trainer.default_root_dir "$run" --ckpt_path last'


def chosen_task(job: Job) -> list[str]:
    """Shell lines that set ``run`` (the task's folder) and ``words`` (its command)."""
    if len(job.tasks) == 1 and not job.tasks[0].name:
        lines = ['run="$folder"', f"words=({shlex.join(job.tasks[0].words)})"]
    elif len(job.tasks) == 1:
        lines = [f'run="$folder/{job.tasks[0].name}"', f"words=({shlex.join(job.tasks[0].words)})"]
    else:
        cases = [f"    {place}) task={task.name}; words=({shlex.join(task.words)}) ;;" for place, task in enumerate(job.tasks)]
        lines = ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac", 'run="$folder/$task"']
    if job.measures:
        lines += ["# The best checkpoint, or the last where none was chosen; in tables it has the name of its folder.",
                  'weights="$run/checkpoints/best.ckpt"; [ -f "$weights" ] || weights="$run/checkpoints/last.ckpt"',
                  'words+=(--models "{\\"$(basename "$run")\\": {\\"pretrained\\": \\"$weights\\"}}")']  # fmt: skip
    return lines


def render_report(job: Job) -> str:
    """The script that joins all cards of a job in one table."""
    cards, site = ", ".join(f"{job.folder}/{task.name}/eval/cards".replace("//", "/") for task in job.tasks), job.site
    lines = ["#!/bin/bash", f"#SBATCH --job-name={job.name}", "#SBATCH --nodes=1", "#SBATCH --ntasks=1", "#SBATCH --time=00:15:00",
             f"#SBATCH --output={job.log}", "#SBATCH --open-mode=append"]  # fmt: skip
    lines += [f"#SBATCH --{option}={value}" for option in ("partition", "account", "qos") if (value := getattr(site, option)) is not None]
    lines += [f"cd {shlex.quote(job.here)} || exit 1", *site.setup]
    command = shlex.join([job.python, job.program, "report", "--cards", f"[{cards}]", "--out", job.folder])
    return "\n".join([*lines, command]) + "\n"
