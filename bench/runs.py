"""Programs that are run to be measured: in a session of their own, or train.py with one recipe and one row's method, resumable."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parents[1]


def to_the_end(command: Sequence[str], limit: float, env: dict[str, str] | None = None) -> str:
    """Runs a command of this project in a session of its own; gives what it said, both of its streams together.

    When it has ended, or after ``limit`` seconds, every process of its group is killed: none that it started outlives it, but for those
    that made a group of their own.

    Args:
        command: program and arguments.
        limit: seconds.
        env: of the environment, what is not as here.

    Raises:
        RuntimeError: it failed; the first line says which and how, the end of its output is below.
        TimeoutError: it was killed after the limit; the same.
    """
    around = {**os.environ, "PYTHONPATH": str(HERE), **(env or {})}
    with tempfile.TemporaryFile() as output:  # a pipe would stay open as long as one of its children lives
        process = subprocess.Popen(command, cwd=HERE, env=around, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            late = process.poll() is None
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        said = output.read().decode(errors="replace")
    name = " ".join(command[1:5])
    if late:
        raise TimeoutError(f"{name} was killed after {limit:g} s:\n{said[-3000:]}")
    if process.returncode:
        raise RuntimeError(f"{name} ended with {process.returncode}:\n{said[-3000:]}")
    return said


@dataclass(frozen=True)
class Method:
    """One row's method: its class, what differs from the shared settings, the factor on rates, and the seeds."""

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    factor: float = 1.0
    seeds: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, name: str, given: dict[str, Any]) -> Method:
        """From the recipe's entry."""
        return cls(name, given["class"], given.get("settings", {}), given.get("factor", 1.0), tuple(given.get("seeds", [0])))


def fit(
    recipe: dict[str, Any], method: Method, folder: Path, rate: float, steps: int, seed: int, trainer: dict[str, Any] | None = None
) -> Path:
    """Trains ``steps`` steps, going on where an earlier start stopped; returns the last checkpoint."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if (folder / "done").exists():
        return checkpoint
    settings = json.loads(json.dumps(recipe["shared"]))
    model = settings["model"]
    model["class_path"] = f"aft.methods.{method.kind}"
    model["init_args"] |= {**method.settings, "seed": seed}
    model["init_args"]["optimizer"]["lr"] = rate
    settings["data"]["init_args"]["seed"] = seed
    settings["seed_everything"] = seed
    settings["trainer"] |= {"max_steps": steps, "limit_val_batches": 0, "default_root_dir": str(folder), **(trainer or {})}
    settings["checkpoint"] = {"monitor": None, "every_n_train_steps": 50}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    run("train.py", "fit", "-c", str(folder / "recipe.yaml"), "--ckpt_path", "last", log=folder / "log.txt")
    (folder / "done").touch()
    return checkpoint


def measured_speed(
    recipe: dict[str, Any], method: Method, folder: Path, rate: float, steps: int, trainer: dict[str, Any] | None = None
) -> float:
    """Images a second of a short run, which is made anew each time: the median of what its steps logged."""
    shutil.rmtree(folder, ignore_errors=True)
    fit(recipe, method, folder, rate, steps, 0, {"log_every_n_steps": 1, **(trainer or {})})
    return images_a_second(folder)


def images_a_second(folder: Path) -> float:
    """Median of what the run logged."""
    speeds = [float(word.split()[-1]) for word in (folder / "log.txt").read_text().split("\n") if "images_per_second" in word]
    return statistics.median(speeds)


def run(*arguments: str, log: Path) -> None:
    """One command of this project with this interpreter; its output goes to a file.

    Raises:
        SystemExit: it failed; the end of the log is shown.
    """
    with log.open("a") as output:
        # jsonargparse reads a file from inside its folder, where the empty entry of sys.path no longer names this one.
        around = {**os.environ, "PYTHONPATH": str(HERE)}
        done = subprocess.run([sys.executable, *arguments], cwd=HERE, env=around, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(arguments[:4])} ended with {done.returncode}:\n{log.read_text()[-2000:]}")
