"""Submits training and evaluation to SLURM, as one command.

    python -m aft.submit --nodes 2 --gpus-per-node 8 --time 24:00:00 -- fit -c configs/methods/tecoa.yaml
    python -m aft.submit --methods tecoa,fare --seeds 0,1,2 -- fit -c configs/data/shards.yaml -- evaluate -c configs/eval/apgd.yaml
    python -m aft.submit --vary 'eps=[1/255],[2/255]' -- evaluate -c configs/eval/apgd.yaml --weights best.ckpt
    python -m aft.submit --resume runs/tecoa-1234

What stands after the first -- is train.py's (fit) or eval.py's (evaluate, curve); a second one measures what was trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from aft.errors import ConfigError, ending_calmly, unknown_name
from aft.submit.estimate import in_words, probe
from aft.submit.local import run_here
from aft.submit.plan import Request, followed, read_record, scripts, submit
from aft.submit.settings import Resources
from aft.submit.tasks import Command


class Parser(argparse.ArgumentParser):
    """Raises instead of printing a usage page."""

    def error(self, message: str) -> NoReturn:
        """Near matches where an option is not known."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if unknown.startswith("--") and message.startswith("unrecognized"):
            known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
            raise ConfigError(f"{unknown_name('option', unknown.partition('=')[0], known)} Options of fit and evaluate come after --.")
        raise ConfigError(f"{message}. See python -m aft.submit --help.")


def parser() -> Parser:
    """The options before the first ``--``."""
    as_written = argparse.RawDescriptionHelpFormatter
    made = Parser(prog="python -m aft.submit", description=__doc__, formatter_class=as_written, allow_abbrev=False)
    made.add_argument("--nodes", type=int, default=1, help="machines (default 1)")
    made.add_argument("--gpus-per-node", type=int, default=1, help="GPUs of each, one process a GPU; 0: CPUs (default 1)")
    made.add_argument("--tasks-per-node", type=int, default=1, help="processes of each node where there are no GPUs (default 1)")
    made.add_argument("--time", default="24:00:00", help="limit of one start; a longer run is queued again and goes on (default 24:00:00)")
    made.add_argument("--name", default="aft", help="of the job and of its folder, NAME-JOBID")
    made.add_argument("--out", type=Path, default=Path("runs"), help="folder of the jobs' folders, seen by all nodes (default runs)")
    made.add_argument("--site", type=Path, help="settings of the cluster (default configs/slurm/default.yaml)")
    made.add_argument("--methods", type=words, default=[], help="array over configs/methods/NAME.yaml: A,B")
    made.add_argument("--seeds", type=numbers, default=[], help="array over seeds: 0,1,2")
    made.add_argument("--vary", action="append", default=[], help="array over any option of the command: KEY=A,B; may be given again")
    made.add_argument("--at-once", type=int, help="tasks of an array that run together")
    made.add_argument("--after", type=words, default=[], help="ids of jobs that must end well first")
    made.add_argument("--resume", type=Path, help="go on in the folder of an earlier job; without a command with what that one ran")
    made.add_argument("--entry", type=Path, help="the train.py to use, with eval.py and configs beside it (default: this checkout's)")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the scripts, submit nothing")
    what.add_argument("--estimate", action="store_true", help="run twenty steps on one process, print the GPU-hours, submit nothing")
    made.add_argument("--local", action="store_true", help="run here, one task after the other, without SLURM")
    return made


def words(text: str) -> list[str]:
    """``A,B`` as a list."""
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[int]:
    """``0,1`` as a list."""
    return [int(word) for word in words(text)]


def split(arguments: Sequence[str]) -> list[list[str]]:
    """The parts between ``--``."""
    parts: list[list[str]] = [[]]
    for word in arguments:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def requested(arguments: Sequence[str]) -> tuple[argparse.Namespace, Request]:
    """The options, and what they ask for.

    Raises:
        ConfigError: an option is unknown, missing or out of range.
        RunError: the folder to resume in has no record.
    """
    ours, *commands = split(arguments)
    given = parser().parse_args(ours)
    if len(commands) > 2:
        raise ConfigError(f"{len(commands)} commands after --: there can be a training and its evaluation.")
    here = Path.cwd()
    if given.resume is not None:
        given.resume = given.resume.resolve()
        before = read_record(given.resume)
        given.name = before["name"] if not commands else given.name
        if not commands:
            given.methods, given.seeds, given.vary = before["methods"], before["seeds"], before["vary"]
            here = Path(before["here"])
            commands = [command for command in (before["command"], before["evaluation"]) if command]
    root = (given.entry.resolve() if given.entry else Path(__file__).resolve().parents[2] / "train.py").parent
    request = Request(
        command=Command(tuple(commands[0] if commands else ())), evaluation=Command(tuple(commands[1])) if len(commands) > 1 else None,
        name=given.name, out=given.out.resolve(), root=root, here=here, site=given.site or root / "configs" / "slurm" / "default.yaml",
        resources=Resources(nodes=given.nodes, gpus_per_node=given.gpus_per_node, tasks_per_node=given.tasks_per_node, time=given.time),
        methods=given.methods, seeds=given.seeds, vary=given.vary, at_once=given.at_once, after=given.after,
    )  # fmt: skip
    return given, request


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what is asked; the exit code.

    Raises:
        AftError: whatever a user can mend.
    """
    given, request = requested(sys.argv[1:] if arguments is None else arguments)
    tasks = request.tasks()
    if given.estimate:
        print(in_words(probe(request, given.local), request.resources, len(tasks)))
    elif given.dry_run:
        print("\n".join(scripts(request)))
    elif given.local:
        return run_here(request, given.resume)
    else:
        print(*followed(request, submit(request, given.resume)), sep="\n")
    return 0


if __name__ == "__main__":
    with ending_calmly():
        sys.exit(main())
