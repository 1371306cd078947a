"""The same job without a cluster: its tasks one after the other, on this machine."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from aft.errors import ConfigError, RunError
from aft.submit.plan import RECORD, Request, check_folder, keep
from aft.submit.settings import Site, read_site

STOP = 128  # from here on an exit code is a signal's


def run_here(request: Request, resume: Path | None = None) -> int:
    """Trains, measures and shows; the first exit code that is not 0, or 0.

    A task that fails is not measured, and the others go on; a signal (Ctrl-C) ends all. Started again with ``--resume`` it goes on.

    Raises:
        ConfigError: more than one node.
        RunError: the folder to go on in is another job's.
    """
    if request.resources.nodes > 1:
        raise ConfigError(f"--nodes {request.resources.nodes} with --local: this machine is one node; leave --nodes out.")
    site = read_site(request.site)
    if resume is not None:
        check_folder(resume, request)
    folder = resume or free_folder(request)
    folder.mkdir(parents=True, exist_ok=True)
    keep(folder, RECORD, json.dumps(request.record({}), indent=1) + "\n")
    print(f"run folder {folder}; after a stop: python -m aft.submit --local --resume {folder}", flush=True)
    worst = 0
    for task in request.tasks():
        for command in commands(request, site, task.words, folder / task.name):
            code = call(command, request, site)
            worst = worst or code
            if code >= STOP or code < 0:
                return code
            if code:
                break
    if request.wants_report and not worst:
        cards = ", ".join(str(folder / task.name / "eval" / "cards") for task in request.tasks())
        eval_py = str(request.root / "eval.py")
        worst = call([request.python(site), eval_py, "report", "--cards", f"[{cards}]", "--out", str(folder)], request, site)
    return worst


def commands(request: Request, site: Site, words: tuple[str, ...], run: Path) -> Iterator[list[str]]:
    """What one task runs: training, then (asked for when that is done) its measurement; or the measurement alone."""
    start, asked = [request.python(site), request.program(request.command), *words], request.resources
    if not request.command.trains:
        yield [*start, "--out", str(run / "eval")]
        return
    place = [] if asked.gpus_per_node else ["--trainer.accelerator", "cpu"]
    yield [*start, *place, "--trainer.devices", str(asked.processes), "--trainer.default_root_dir", str(run), "--ckpt_path", "last"]
    if request.evaluation is None:
        return
    best, last = run / "checkpoints" / "best.ckpt", run / "checkpoints" / "last.ckpt"
    trained = {run.name: {"pretrained": str(last if last.is_file() and not best.is_file() else best)}}
    yield [request.python(site), request.program(request.evaluation), *request.evaluation.words,
           "--models", json.dumps(trained), "--out", str(run / "eval")]  # fmt: skip


def call(command: list[str], request: Request, site: Site) -> int:
    """One command; its exit code, above 128 where a signal ended it. Ctrl-C is the command's to handle."""
    process = subprocess.Popen(command, cwd=request.here, env={**os.environ, **site.environment})
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the command got it, too, and saves
            continue
        return code if code >= 0 else STOP - code


def free_folder(request: Request) -> Path:
    """``NAME-local-1``, or the first number that is free.

    Raises:
        RunError: the folder of folders cannot be written.
    """
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {request.out} cannot be made ({error}): choose a folder that you can write to.") from error
    return next(path for path in (request.out / f"{request.name}-local-{number}" for number in count(1)) if not path.exists())
