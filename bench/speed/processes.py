"""Two CPU processes against one on the same global batch: the same gradients, and what working together costs.

Run as a program it is one of the jobs: ``python -m bench.speed.processes JOB PROCESSES FOLDER STEPS``; Lightning starts the other process.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from aft.batch import Batch
from aft.errors import RunError
from aft.methods import OptimizerSpec, TeCoA
from aft.methods.distributed import leave_process_group
from bench.runs import to_the_end
from bench.scaling import as_the_slower
from bench.scaling_two import Timed, Turns
from bench.scaling_two import fit as fit_two
from bench.speed.row import Effort, Found, NotHere, ratios
from bench.speed.setting import MadeUp, tiny
from bench.speed.training import attack_of
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
    """Steps of MiniCLIP-32 of each kind of ``bench.scaling_two`` in turn, one thread a process; the first turn is left out."""
    torch.set_num_threads(1)
    timed = Timed()
    fit_two("TeCoA", 2, Turns(GLOBAL_BATCH, steps + 1), timed)
    (folder / f"pace-{dist.get_rank()}.json").write_text(json.dumps(timed.seconds), encoding="utf-8")
    dist.barrier()


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
    if not all(bool(value.isfinite().all()) for found in (one, two) for value in found.values()):
        raise RunError("a gradient of the two processes, or of the one, is not finite: nothing can be compared; look at the model.")
    largest = max(float(value.abs().max()) for value in one.values())
    off = max(float((one[name] - two[name]).abs().max()) for name in one)
    return Found([off / largest], {}, {"model": "the tiny CLIP", "batch_size": GLOBAL_BATCH, "precision": "float64"})


def overhead(effort: Effort) -> Found:
    """Twice a step of two processes over a step that one takes alone with the same global batch: what is spent beyond one's own work.

    Above 1 are sending and waiting, the work that each does whole (optimiser, texts), smaller products, and sharing the memory's lanes.
    ``told["all_reduce"]``: of it, a step with the gradients' all-reduce over one without. The steps lie side by side, each kind first in
    turn.
    """
    if (os.cpu_count() or 1) < 2:
        raise NotHere("two processes need two cores")
    with tempfile.TemporaryDirectory() as folder:
        start("pace", 2, Path(folder), effort.repeats(21))
        first, second = (json.loads((Path(folder) / f"pace-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    seconds = as_the_slower(first, second)
    told = {"global_batch": GLOBAL_BATCH, "threads_a_process": 1, "attack_steps": 2,
            "all_reduce": statistics.median(ratios(seconds["synced"], seconds["unsynced"]))}  # fmt: skip
    return Found([2 * one for one in ratios(seconds["synced"], seconds["alone"])], seconds, told)


if __name__ == "__main__":
    try:
        JOBS[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    finally:
        leave_process_group()
