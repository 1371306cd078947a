"""What a training will cost, from twenty of its steps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from aft.errors import ConfigError, RunError
from aft.submit.plan import Request
from aft.submit.settings import Resources, Site, read_site

PROBING = ("--trainer.callbacks+=callbacks.Probe", "--trainer.limit_val_batches=0", "--checkpoint.monitor=null", "--trainer.devices=1",
           "--trainer.num_nodes=1")  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """What ``callbacks.Probe`` measured on one process.

    Args:
        seconds: of an optimiser step, median.
        timed: how many steps that is the median of.
        images: of a step.
        steps: of the whole run, as it would be on one process.
        fixed: whether the run's length is given in steps (each process added then means more images, not fewer steps).
    """

    seconds: float
    timed: int
    images: int
    steps: float
    fixed: bool

    def hours(self, processes: int) -> float:
        """GPU-hours (of processes, on CPUs) on so many processes, if each step takes as long there as here.

        ``seconds * steps / 3600`` where the images are given (more processes share them), times the processes where the steps are.
        """
        return self.seconds * self.steps * (processes if self.fixed else 1) / 3600


def probe(request: Request, local: bool) -> Probe:
    """Runs twenty steps of the first task on one process, here or as a short job on one GPU.

    Raises:
        ConfigError: the command trains nothing.
        RunError: it failed, or the run has no end.
    """
    if not request.command.trains:
        raise ConfigError("--estimate is for fit: an evaluation says itself how long it takes.")
    site = read_site(request.site)
    request.out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="probe-", dir=request.out))
    try:
        command = [request.python(site), request.program(request.command), *request.tasks()[0].words, *PROBING]
        place = [] if request.resources.gpus_per_node else ["--trainer.accelerator", "cpu"]
        before = [] if local else short_job(request, site)
        words = [*before, *command, *place, "--trainer.default_root_dir", str(folder)]
        done = subprocess.run(words, cwd=request.here, env={**os.environ, **site.environment}, capture_output=True, text=True)
        if done.returncode or not (folder / "probe.json").is_file():
            raise RunError(f"the probe of twenty steps failed:\n{(done.stderr or done.stdout)[-2000:]}")
        return Probe(**json.loads((folder / "probe.json").read_text(encoding="utf-8")))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def short_job(request: Request, site: Site) -> list[str]:
    """``srun`` and its options for one process on one GPU, a quarter of an hour."""
    gpu = ["--gres=gpu:1" if site.gpus == "gres" else "--gpus-per-node=1"] if request.resources.gpus_per_node else []
    asked = {"partition": site.partition, "account": site.account, "qos": site.qos, "cpus-per-task": site.cpus_per_task}
    options = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    return ["srun", "--job-name=aft-probe", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--time=15", *gpu, *options, *site.srun]


def in_words(found: Probe, resources: Resources, tasks: int) -> str:
    """The estimate, with what it rests on."""
    processes = resources.nodes * resources.processes
    unit = "GPU-hours" if resources.gpus_per_node else "process-hours"
    hours = found.hours(processes)
    return (
        f"probe: {found.seconds:.3g} s a step of {found.images} images (median of {found.timed} steps on one process)\n"
        f"estimate: {hours:.3g} {unit} a task on {processes} processes, {hours / processes:.3g} h; {tasks * hours:.3g} {unit} for {tasks} "
        f"task{'s' * (tasks > 1)}.\n"
        "Without validation, start and waiting between processes; with them it is more. Every step at full strength: phases are left out."
    )
