"""What a job asks for, and what a site wants to hear: data, checked before anything is submitted."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from aft.errors import ConfigError, unknown_name

TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
HIDING = ("bash", "interactive")


@dataclass(frozen=True, kw_only=True)
class Site:
    """What is the same for all jobs of a cluster; ``configs/slurm/*.yaml`` hold it.

    Args:
        partition, account, qos, constraint: as ``sbatch`` takes them; none: the site's default.
        cpus_per_task: cores of each process (a GPU has one process): one for the training loop and one for each loader worker.
        mem_per_cpu: memory a core, such as ``4G``; none: the site's default.
        gpus: how GPUs are asked for: ``gpus-per-node`` or ``gres``.
        notice: seconds before the time limit at which the processes are told (SIGUSR1): more than a step, a validation and a
            checkpoint take together.
        max_requeues: how often a job may be queued again before it counts as failed.
        python: the interpreter; none: the one that runs ``aft.submit``.
        setup: shell lines before the command, such as ``module load cuda``.
        environment: variables of the processes.
        sbatch: further options of ``sbatch``, such as ``--exclusive``.
        srun: further options of ``srun``, such as ``--mpi=none``.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int | None = None
    mem_per_cpu: str | None = None
    gpus: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    notice: int = 120
    max_requeues: int = 50
    python: str | None = None
    setup: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    sbatch: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one job asks for.

    Args:
        nodes: machines.
        gpus_per_node: GPUs of each, one process a GPU; 0: a run on CPUs.
        tasks_per_node: processes of each node where there are no GPUs.
        time: limit of one start as ``sbatch`` takes it; a job that needs longer is queued again and goes on.

    Raises:
        ConfigError: numbers or a time that no cluster could give.
    """

    nodes: int = 1
    gpus_per_node: int = 1
    tasks_per_node: int = 1
    time: str = "24:00:00"

    def __post_init__(self) -> None:
        for name, value, least in (("nodes", self.nodes, 1), ("gpus-per-node", self.gpus_per_node, 0),
                                   ("tasks-per-node", self.tasks_per_node, 1)):  # fmt: skip
            if value < least:
                raise ConfigError(f"--{name} {value} is below {least}.")
        if self.gpus_per_node and self.tasks_per_node not in (1, self.gpus_per_node):
            raise ConfigError(f"--tasks-per-node {self.tasks_per_node} with {self.gpus_per_node} GPUs: each has one process; leave it out.")
        if not TIME.fullmatch(self.time):
            raise ConfigError(f"--time {self.time} is no time: write minutes, HH:MM:SS, or D-HH:MM:SS.")

    @property
    def processes(self) -> int:
        """Of one node."""
        return self.gpus_per_node or self.tasks_per_node


def check_name(name: str) -> str:
    """The job's name, if it can be one.

    Raises:
        ConfigError: letters that a folder's name should not have, or a name under which Lightning would not see SLURM.
    """
    if name in HIDING:
        raise ConfigError(f"--name {name}: under the job names {' and '.join(HIDING)} Lightning does not see SLURM, and every process "
                          "would train alone. Choose another name.")  # fmt: skip
    if not NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r} becomes part of a folder's name: use letters, digits, and . _ - (not first).")
    return name


def read_site(path: Path) -> Site:
    """A site's settings.

    Raises:
        ConfigError: no such file, an unknown key (near matches are named), or a value of another type.
    """
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) or "none there"
        raise ConfigError(f"--site {path}: there is no such file. In that folder: {known}.")
    given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(given, dict):
        raise ConfigError(f"--site {path} holds no settings: write KEY: VALUE lines.")
    known_fields = {one.name: one for one in fields(Site)}
    for key, value in given.items():
        if key not in known_fields:
            raise ConfigError(f"--site {path}: {unknown_name('setting', str(key), known_fields)}")
        _check_type(path, key, value, str(known_fields[key].type))
    return Site(**{key: _strings(value) for key, value in given.items()})


def _strings(value: Any) -> Any:
    """Elements of lists and dictionaries as text: YAML reads ``NCCL_DEBUG: 1`` as a number."""
    if isinstance(value, dict):
        return {str(key): str(one) for key, one in value.items()}
    return [str(one) for one in value] if isinstance(value, list) else value


def _check_type(path: Path, key: str, value: Any, wanted: str) -> None:
    kinds = {"int": int, "list": list, "dict": dict, "str": str, "Literal": str}
    kind = next(kind for name, kind in kinds.items() if wanted.startswith(name))
    if (value is None and "None" in wanted) or (isinstance(value, kind) and not isinstance(value, bool)):
        if key == "gpus" and value not in ("gpus-per-node", "gres"):
            raise ConfigError(f"--site {path}: {unknown_name('value of gpus', str(value), ('gpus-per-node', 'gres'))}")
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"--site {path}: {key} = {value} is below 1.")
        return
    raise ConfigError(f"--site {path}: {key} = {value!r} is no {wanted}.")
