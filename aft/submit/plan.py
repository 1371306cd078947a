"""From what was asked to what is submitted: training, its evaluation, and the table at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aft.errors import ConfigError, RunError
from aft.submit import slurm
from aft.submit.script import BY_NUMBER, Job, render, render_report
from aft.submit.settings import Resources, Site, check_name, read_site
from aft.submit.tasks import Command, Task, tasks_of

RECORD = "job.json"


@dataclass(frozen=True, kw_only=True)
class Request:
    """All that was asked for.

    Args:
        command: what runs.
        evaluation: what measures each trained task afterwards; none: nothing.
        name: of the job, and the first part of its folder's name.
        out: the folder of run folders.
        root: the checkout, with ``train.py``, ``eval.py`` and ``configs``.
        here: where the command was given, which its relative paths start from.
        site: file of site settings.
        resources: of each task.
        methods, seeds, vary: what an array varies.
        at_once: tasks that run together.
        after: ids of jobs that must end well first.

    Raises:
        ConfigError: a name or number that cannot be, a second command that measures nothing, or a file that is not there.
    """

    command: Command
    evaluation: Command | None
    name: str
    out: Path
    root: Path
    here: Path
    site: Path
    resources: Resources
    methods: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    vary: list[str] = field(default_factory=list)
    at_once: int | None = None
    after: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.at_once is not None and self.at_once < 1:
            raise ConfigError(f"--at-once {self.at_once} is below 1.")
        if self.evaluation is not None and (not self.command.trains or self.evaluation.trains):
            raise ConfigError("a second command measures what the first trained: write -- fit ... -- evaluate ...")
        for command in (self.command, self.evaluation or self.command):
            command.check_files(self.here)
        for program in {self.program(self.command), self.program(self.evaluation or self.command)}:
            if not Path(program).is_file():
                raise ConfigError(f"there is no {program}: start in a checkout, or name the one to use with --entry FOLDER/train.py.")

    def program(self, command: Command) -> str:
        """The script of a command."""
        return str(self.root / ("train.py" if command.trains else "eval.py"))

    def tasks(self) -> list[Task]:
        """Every combination of what varies."""
        return tasks_of(self.command, self.methods, self.seeds, self.vary, self.root / "configs")

    def python(self, site: Site) -> str:
        """The interpreter of the jobs."""
        return site.python or sys.executable

    def first_job(self, site: Site, folder: str | None = None) -> Job:
        """The training, or the evaluation where nothing is trained; in a folder that bears its number, or in a given one."""
        tasks = self.tasks()
        number = "%A" if len(tasks) > 1 else "%j"
        log = f"{folder or f'{self.out}/{self.name}-{number}'}/{'slurm-%a.log' if len(tasks) > 1 else 'slurm.log'}"
        place = folder or f"{self.out}/{self.name}-{BY_NUMBER}"
        return Job(name=self.name, tasks=tasks, program=self.program(self.command), python=self.python(site), here=str(self.here),
                   folder=place, site=site, log=log, resources=self.resources, at_once=self.at_once)  # fmt: skip

    def second_job(self, site: Site, folder: str) -> Job:
        """The evaluation of what was trained: one node, and one process a GPU, each with its share of the images."""
        assert self.evaluation is not None
        tasks = [Task(task.name, self.evaluation.words) for task in self.tasks()]
        one = Resources(nodes=1, gpus_per_node=self.resources.gpus_per_node, tasks_per_node=self.resources.tasks_per_node,
                        time=self.resources.time)  # fmt: skip
        log = f"{folder}/evaluate-%a.log" if len(tasks) > 1 else f"{folder}/evaluate.log"
        return Job(name=f"{self.name}-evaluate", tasks=tasks, program=self.program(self.evaluation), python=self.python(site),
                   here=str(self.here), folder=folder, log=log, resources=one, site=site, measures=True, at_once=self.at_once)  # fmt: skip

    def report(self, site: Site, folder: str) -> str:
        """The script of the table."""
        return render_report(Job(name=f"{self.name}-report", tasks=self.tasks(), program=str(self.root / "eval.py"),
                                 python=self.python(site), here=str(self.here), folder=folder, log=f"{folder}/report.log",
                                 resources=Resources(), site=site))  # fmt: skip

    @property
    def wants_report(self) -> bool:
        """Whether there will be several cards, or a training's, to join."""
        return self.evaluation is not None or (not self.command.trains and len(self.tasks()) > 1)

    def record(self, jobs: dict[str, str]) -> dict[str, Any]:
        """What is kept beside the runs, to go on with them."""
        return {"command": list(self.command.words), "evaluation": list(self.evaluation.words) if self.evaluation else None,
                "here": str(self.here), "name": self.name, "methods": self.methods, "seeds": self.seeds, "vary": self.vary, "jobs": jobs,
                "tasks": [task.name for task in self.tasks()]}  # fmt: skip


def scripts(request: Request) -> list[str]:
    """All scripts as they would be submitted, for ``--dry-run``."""
    site = read_site(request.site)
    found = [render(request.first_job(site))]
    place = f"{request.out}/{request.name}-JOBID"
    if request.evaluation is not None:
        found.append(render(request.second_job(site, place)))
    return found + ([request.report(site, place)] if request.wants_report else [])


def submit(request: Request, resume: Path | None = None) -> Path:
    """Submits everything, or nothing.

    Args:
        request: what was asked for.
        resume: the folder of an earlier job to go on in; none: a new one.

    Returns:
        The job's folder; its ``job.json`` has the ids.

    Raises:
        RunError: no SLURM here, the cluster cannot give what is asked for, or the folder is another job's, in use or not to be written.
    """
    site = read_site(request.site)  # what the user can mend in the command comes first
    slurm.need_slurm()
    if resume is not None:
        check_folder(resume, request)
    job = request.first_job(site, str(resume) if resume else None)
    slurm.try_out(render(job))
    after = [f"--dependency=afterok:{':'.join(request.after)}"] if request.after else []
    jobs = {"first": slurm.submit(render(job), ["--hold", *after])}  # held: its folder bears its number and must be there for its log
    folder = resume or request.out / f"{request.name}-{jobs['first']}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        keep(folder, "submit.sh", render(job))
        if request.evaluation is not None:
            script = render(request.second_job(site, str(folder)))
            keep(folder, "evaluate.sh", script)
            each = "aftercorr" if len(job.tasks) > 1 else "afterok"
            jobs["evaluation"] = slurm.submit(script, [f"--dependency={each}:{jobs['first']}", "--kill-on-invalid-dep=yes"])
        if request.wants_report:
            script = request.report(site, str(folder))
            keep(folder, "report.sh", script)
            jobs["report"] = slurm.submit(script, [f"--dependency=afterany:{jobs.get('evaluation', jobs['first'])}"])
        keep(folder, RECORD, json.dumps(request.record(jobs), indent=1) + "\n")
        slurm.release(jobs["first"])
    except (RunError, OSError) as error:
        slurm.cancel(list(jobs.values()))
        if isinstance(error, RunError):
            raise
        raise RunError(f"{folder} cannot be written ({error}): choose a folder that all nodes see, with --out; no job is left.") from error
    return folder


def keep(folder: Path, name: str, text: str) -> None:
    """One file of the job's folder."""
    (folder / name).write_text(text, encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """What an earlier submission left in its folder.

    Raises:
        RunError: nothing.
    """
    try:
        found: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError) as error:
        raise RunError(f"--resume {folder}: there is no readable {RECORD} in it: give the folder that aft.submit made.") from error


def check_folder(folder: Path, request: Request) -> None:
    """Looks whether a folder is this job's, and free.

    Raises:
        RunError: it is another job's, or one of its jobs still waits or runs.
    """
    before = read_record(folder)
    differ = [key for key, value in request.record({}).items() if key != "jobs" and before.get(key) != value]
    if differ:
        raise RunError(f"{folder} is the folder of another run ({', '.join(differ)} differ from its {RECORD}): leave --resume out for a "
                       "new one, or give --resume without a command to go on with that run.")  # fmt: skip
    active = [job for job in before.get("jobs", {}).values() if slurm.is_active(job)]
    if active:
        raise RunError(f"job {', '.join(active)} of {folder} still waits or runs: let it, or scancel it first.")


def followed(request: Request, folder: Path) -> Sequence[str]:
    """What to say after a submission: ids, and how to follow them."""
    jobs, tasks = read_record(folder)["jobs"], request.tasks()
    log = folder / ("slurm-0.log" if len(tasks) > 1 else "slurm.log")
    lines = [f"job {jobs['first']}: {len(tasks)} task{'s' * (len(tasks) > 1)}, folder {folder}"]
    lines += [f"then {name}: job {jobs[name]}" for name in ("evaluation", "report") if name in jobs]
    return [*lines, f"state: squeue --jobs={','.join(jobs.values())}", f"log:   tail -F {log}", f"stop:  scancel {' '.join(jobs.values())}",
            f"go on: python -m aft.submit --resume {folder}"] + ([f"table: {folder / 'report.log'}"] if "report" in jobs else [])
