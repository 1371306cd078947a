"""Two CPU processes against one on the same global batch: the same gradients, and what working together costs.

Run as a program it is one of the jobs: ``python -m bench.speed.processes JOB PROCESSES FOLDER STEPS``; Lightning starts the other process.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from aft.batch import Batch
from aft.methods import OptimizerSpec, TeCoA
from aft.methods.distributed import leave_process_group
from bench.runs import to_the_end
from bench.speed.row import Effort, Found, NotHere, ratios
from bench.speed.setting import MINI, WARM, MadeUp, tiny
from bench.speed.training import ADAMW, attack_of
from train import DDP

GLOBAL_BATCH = 64
LIMIT = 600  # seconds of a job


class Split(MadeUp):
    """Each process takes every W-th image of the batch."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(GLOBAL_BATCH)
        self.batch = Batch(self.batch.images.to(dtype), self.batch.index, self.batch.labels)

    def train_dataloader(self) -> DataLoader[Batch]:
        """This process's part of the batch, again and again."""
        assert self.trainer is not None and self.batch.labels is not None
        rows = slice(self.trainer.global_rank, None, self.trainer.world_size)
        part = Batch(self.batch.images[rows], self.batch.index[rows], self.batch.labels[rows])
        return DataLoader([part] * 1000, batch_size=None)  # type: ignore[arg-type]


class Clock(L.Callback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """One more."""
        self.ends.append(time.perf_counter())


def fit(method: TeCoA, data: L.LightningDataModule, processes: int, steps: int, precision: Any, callbacks: list[L.Callback]) -> L.Trainer:
    """On so many processes."""
    trainer = L.Trainer(
        accelerator="cpu", devices=processes, strategy=DDPStrategy(**{**DDP, "timeout": None}) if processes > 1 else "auto",
        max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, use_distributed_sampler=False, precision=precision, callbacks=callbacks,
        default_root_dir=tempfile.gettempdir(),
    )  # fmt: skip
    trainer.fit(method, datamodule=data)
    return trainer


def gradient(processes: int, folder: Path, steps: int) -> None:
    """One step of plain descent with rate 1 in float64: what it took from the weights is the gradient. Rank 0 stores it."""
    plain = OptimizerSpec(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant")
    torch.manual_seed(0)  # the tiny model's weights are random
    method = TeCoA(tiny(), attack=attack_of(2), optimizer=plain)
    before = {name: p.detach().double().clone() for name, p in method.named_parameters() if p.requires_grad}
    if fit(method, Split(torch.float64), processes, 1, "64-true", []).global_rank == 0:
        now = dict(method.named_parameters())
        torch.save({name: value - now[name].detach() for name, value in before.items()}, folder / f"gradient-{processes}.pt")


def pace(processes: int, folder: Path, steps: int) -> None:
    """Steps of MiniCLIP-32, one thread a process; a single process takes half the batch, so that each has the same to do."""
    torch.set_num_threads(1)
    data = Split(torch.float32) if processes > 1 else MadeUp(GLOBAL_BATCH // 2)
    clock = Clock()
    if fit(TeCoA(MINI, attack=attack_of(2), optimizer=ADAMW), data, processes, steps + WARM, "32-true", [clock]).global_rank == 0:
        (folder / f"pace-{processes}.json").write_text(json.dumps(clock.ends), encoding="utf-8")


JOBS = {"gradient": gradient, "pace": pace}


def start(job: str, processes: int, folder: Path, steps: int = 1) -> None:
    """Runs a job to its end, both processes of it."""
    to_the_end([sys.executable, "-m", "bench.speed.processes", job, str(processes), str(folder), str(steps)], LIMIT)


def same_gradients(effort: Effort) -> Found:
    """The largest difference of the two gradients over the largest entry, float64."""
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            start("gradient", processes, Path(folder))
        one, two = (torch.load(Path(folder) / f"gradient-{processes}.pt", weights_only=True) for processes in (1, 2))
    largest = max(float(value.abs().max()) for value in one.values())
    off = max(float((one[name] - two[name]).abs().max()) for name in one)
    return Found([off / largest], {}, {"model": "the tiny CLIP", "batch_size": GLOBAL_BATCH, "precision": "float64"})


def overhead(effort: Effort) -> Found:
    """A step of two processes over that of one alone with the same images a process: waiting, sending, and sharing the memory's lanes."""
    if (os.cpu_count() or 1) < 2:
        raise NotHere("two processes need two cores")
    steps = effort.repeats(20)
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            start("pace", processes, Path(folder), steps)
            ends = json.loads((Path(folder) / f"pace-{processes}.json").read_text(encoding="utf-8"))
            seconds[processes] = [after - before for before, after in zip(ends[WARM - 1:], ends[WARM:], strict=False)]
    told = {"images_a_process": GLOBAL_BATCH // 2, "threads_a_process": 1, "attack_steps": 2}
    return Found(ratios(seconds[2], seconds[1]), {"two": seconds[2], "one": seconds[1]}, told)


if __name__ == "__main__":
    try:
        JOBS[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    finally:
        leave_process_group()
