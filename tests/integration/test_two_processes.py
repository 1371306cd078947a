"""Two CPU processes (gloo): the same gradient as one, and no hang when one of them is stopped or sees NaN alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("two_processes.py")
pytestmark = pytest.mark.timeout(280)


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A run folder with the tiny model beside it."""
    shutil.copytree(tiny_folder, tmp_path / "tiny")
    return tmp_path


def start(job: str, devices: int, folder: Path, **settings: Any) -> subprocess.Popen[str]:
    """Starts a job of ``two_processes.py``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), job, str(devices), str(folder), json.dumps(settings)]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(job: str, devices: int, folder: Path, **settings: Any) -> str:
    """Runs it to its end, which must be a good one."""
    process = start(job, devices, folder, **settings)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Relative to the largest element, over all parameters."""
    assert first.keys() == second.keys() and first
    scale = max(float(value.abs().max()) for value in first.values())
    return max(float((first[key] - second[key]).abs().max()) for key in first) / scale


def running(pid: int) -> bool:
    """Whether this process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


TRAINABLE: list[dict[str, Any]] = [
    {"name": "all"},
    {"name": "first", "blocks": 1},
    {"name": "last", "blocks": 1},
    {"name": "lora", "rank": 2},
    {"name": "prompts", "pad": 4, "tokens": 3},
    {"name": "prompts", "pad": 0, "tokens": 3, "deep": True},
]


def test_two_processes_and_two_parts_take_the_step_of_one(folder: Path) -> None:
    """Same global batch, float64: the same gradient to 1e-10 whatever learns; the attack's noise does not depend on who computes it."""
    run("step", 1, folder, file="one", parts=1, trainable=TRAINABLE)
    run("step", 2, folder, file="two", parts=1, trainable=TRAINABLE)
    run("step", 1, folder, file="parts", parts=2, trainable=TRAINABLE)
    for place in range(len(TRAINABLE)):
        one, two, parts = (torch.load(folder / f"{name}-{place}.pt", weights_only=True) for name in ("one", "two", "parts"))
        assert max(float(value.abs().max()) for value in one.values()) > 0
        assert largest_difference(one, two) < 1e-10 and largest_difference(one, parts) < 1e-10, TRAINABLE[place]


def test_every_method_takes_the_same_step_on_two_processes(folder: Path) -> None:
    """All methods in one process group, float64: what couples samples is gathered, sums run over the global batch, 1e-10."""
    names = [*RECIPES]
    run("methods", 1, folder, file="one", names=names)
    run("methods", 2, folder, file="two", names=names)
    for name in names:
        one, two = (torch.load(folder / f"{count}-{name}.pt", weights_only=True) for count in ("one", "two"))
        assert max(float(value.abs().max()) for value in one.values()) > 0
        assert largest_difference(one, two) < 1e-10, name


def test_cheaper_options_train_alike_on_two_processes(folder: Path) -> None:
    """Float64: phases and dropped patches are those of the step on every process, and each holds the perturbations of all."""
    run("cheaper", 1, folder, file="one")
    run("cheaper", 2, folder, file="two")
    for name in ("phases", "warm_start", "free"):
        one, two = (torch.load(folder / f"{count}-{name}.pt", weights_only=True) for count in ("one", "two"))
        assert largest_difference(one["weights"], two["weights"]) < 1e-10, name
        if one["store"]:
            orders = [found["store"]["index"].argsort() for found in (one, two)]
            changes = [found["store"]["change"][order] for found, order in zip((one, two), orders, strict=True)]
            assert one["store"]["count"] == two["store"]["count"] == 24 and torch.equal(*changes) and changes[0].abs().max() > 0


def test_sigterm_to_one_of_two_ends_both_with_a_checkpoint(folder: Path) -> None:
    """R1, R2: within 30 s, exit code 143, a checkpoint of a whole step."""
    process = start("endless", 2, folder)
    while not all((folder / f"pid{rank}").is_file() and (folder / f"pid{rank}").read_text() for rank in (0, 1)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    other = int((folder / "pid1").read_text())
    os.kill(other, signal.SIGTERM)
    began = time.monotonic()
    output, _ = process.communicate(timeout=60)
    while running(other) and time.monotonic() - began < 30:
        time.sleep(0.1)
    assert time.monotonic() - began < 30 and process.returncode == 143, output
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    assert saved["global_step"] >= 3 and f"stopped after step {saved['global_step']}" in output


def test_nan_on_one_rank_is_skipped_by_both(folder: Path) -> None:
    """R25: the same finite weights on both, counted on both, and a line that says so with the samples of the process that saw it."""
    output = run("spoiled", 2, folder)
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert [weights.pop("skipped") for weights in (first, second)] == [1, 1]
    assert all(torch.equal(first[key], second[key]) and torch.isfinite(first[key]).all() for key in first)
    assert "the gradient of step 2 is not finite (from samples 9, 11, 13, 15): the step is skipped" in output
    assert "the gradient of step 2 is not finite (the loss of this process is finite; another's is not" in output
