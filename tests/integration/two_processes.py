"""What the tests of several processes run: ``python two_processes.py JOB DEVICES FOLDER SETTINGS``. Lightning starts the other process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from aft.attacks import PGD
from aft.batch import Batch
from aft.clip import ModelSpec, TrainableSpec, weights
from aft.methods import AdversarialFineTuning, OptimizerSpec, Phase, TeCoA, WarmStart
from aft.methods.distributed import leave_process_group
from callbacks import AtomicCheckpointIO, Interruption
from datamodules import ImageFolder, Shards
from tests.conftest import MemoryData
from tests.methods.recipes import build
from train import DDP


class Split(MemoryData):
    """Each process takes every W-th image, so that the processes' batches together are one process's batch."""

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of this process."""
        assert self.trainer is not None
        rank, world = self.trainer.global_rank, self.trainer.world_size
        rows = torch.arange(len(self.labels))[rank::world].split(self.batch_size // world)
        return DataLoader([Batch(self.images[r], r, self.labels[r]) for r in rows], batch_size=None)  # type: ignore[arg-type]


class Pids(L.Callback):
    """Tells the test who is who, once training goes on; a slow step gives the test time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """After each step."""
        if trainer.global_step == 3:
            (self.folder / f"pid{trainer.global_rank}").write_text(str(os.getpid()))


class Spoil(L.Callback):
    """Makes rank 1's loss NaN at its second step."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """A scale of NaN for one step."""
        pl_module.logit_scale = float("nan") if trainer.global_rank == 1 and trainer.global_step == 1 else 10.0


def run(
    method: AdversarialFineTuning, devices: int, folder: Path, steps: int, callbacks: list[L.Callback],
    data: L.LightningDataModule | None, **settings: Any,
) -> L.Trainer:  # fmt: skip
    """Fits it, in float64 unless said otherwise."""
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=DDPStrategy(**{**DDP, "timeout": None}) if devices > 1 else "auto", max_steps=steps,
        max_epochs=-1, logger=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        use_distributed_sampler=False, default_root_dir=str(folder), callbacks=callbacks, plugins=[AtomicCheckpointIO()],
        **{"precision": "64-true", "enable_checkpointing": False, **settings},
    )  # fmt: skip
    trainer.fit(method, datamodule=data or Split(count=24, batch_size=8, dtype=torch.float64))
    return trainer


def fit(
    devices: int, folder: Path, steps: int, callbacks: list[L.Callback], data: Split | None = None, **settings: Any
) -> tuple[TeCoA, L.Trainer]:
    """TeCoA on the tiny model in float64, by plain gradient descent with rate 1."""
    trainer_settings = settings.pop("trainer", {})
    method = TeCoA(
        ModelSpec("tiny"), attack=PGD(eps="8/255", step_size="4/255", steps=2), **settings,
        optimizer=OptimizerSpec(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant"),
    )  # fmt: skip
    return method, run(method, devices, folder, steps, callbacks, data, **trainer_settings)


def step(devices: int, folder: Path, settings: dict[str, Any]) -> None:
    """One step for each choice of what learns; rank 0 stores what it added to each trained parameter."""
    for place, trainable in enumerate(settings["trainable"]):
        before = Before()
        data = Split(count=24, batch_size=8 // settings["parts"], dtype=torch.float64)
        accumulated = {"accumulate_grad_batches": settings["parts"]}
        method, trainer = fit(devices, folder, 1, [before], data, trainer=accumulated, trainable=TrainableSpec(**trainable))
        if trainer.global_rank == 0:
            now = dict(method.named_parameters())
            added = {key: now[key].detach() - value for key, value in before.weights.items()}
            torch.save(added, folder / f"{settings['file']}-{place}.pt")


class Before(L.Callback):
    """The trained weights before the first step; LoRA's second factor starts at zero, so it is moved first."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps them."""
        for key, p in pl_module.named_parameters():
            if p.requires_grad:
                if key.endswith("up_OR"):
                    p.data.copy_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p))
                self.weights[key] = p.detach().clone()


def methods(devices: int, folder: Path, settings: dict[str, Any]) -> None:
    """One step of every method, all in one process group; rank 0 stores what it added to each trained parameter."""
    for name in settings["names"]:
        before = Before()
        plain = OptimizerSpec(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant")
        method = build(name, ModelSpec("tiny"), optimizer=plain)
        trainer = run(method, devices, folder, 1, [before], Split(count=24, batch_size=8, dtype=torch.float64))
        if trainer.global_rank == 0:
            now = dict(method.named_parameters())
            added = {key: now[key].detach() - value for key, value in before.weights.items()}
            torch.save(added, folder / f"{settings['file']}-{name}.pt")


def cheaper(devices: int, folder: Path, settings: dict[str, Any]) -> None:
    """Three steps on one global batch over and over, by every cheaper option; rank 0 stores its weights."""
    plain = OptimizerSpec(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant")
    for name, options in {
        "phases": {"phases": [Phase(until=0.4, clean=True), Phase(until=0.7, drop_patches=0.5, resolution=16, attack={"steps": 1})]},
        "warm_start": {"warm_start": WarmStart(capacity=8)},
        "free": {"warm_start": WarmStart(free=True, capacity=8)},
    }.items():
        method = build("tecoa", ModelSpec("tiny"), optimizer=plain, **options)
        trainer = run(method, devices, folder, 3, [], Split(count=8, batch_size=8, dtype=torch.float64))
        store = method.perturbations
        if trainer.global_rank == 0:
            found = {"weights": method.model.state_dict(), "store": store.state() if store else {}}
            torch.save(found, folder / f"{settings['file']}-{name}.pt")


def endless(devices: int, folder: Path, settings: dict[str, Any]) -> None:
    """Steps until somebody stops it."""
    saver = ModelCheckpoint(folder, save_last=True)
    fit(devices, folder, 100_000, [Pids(folder), Interruption(), saver], trainer={"enable_checkpointing": True}, **settings)


def spoiled(devices: int, folder: Path, settings: dict[str, Any]) -> None:
    """Three steps, the second of which is NaN on rank 1; every rank stores its weights."""
    method, trainer = fit(devices, folder, 3, [Spoil()], logit_scale=10.0)
    told = {"skipped": trainer.callback_metrics["train/skipped_steps"]}
    torch.save({**method.model.state_dict(), **told}, folder / f"rank{trainer.global_rank}.pt")


def damaged(devices: int, folder: Path, settings: dict[str, Any]) -> None:
    """An epoch over data that may be damaged; ``settings`` say which."""
    kind = settings.pop("kind")
    data = (ImageFolder if kind == "folder" else Shards)(batch_size=2, augment="none", **settings)
    run(build("tecoa", ModelSpec("tiny")), devices, folder, 4, [], data, precision="32-true")


if __name__ == "__main__":
    job, devices, folder, settings = sys.argv[1:]
    weights.EMBEDDED["tiny"] = Path(folder) / "tiny"
    try:
        jobs = {"step": step, "methods": methods, "cheaper": cheaper, "endless": endless, "spoiled": spoiled, "damaged": damaged}
        jobs[job](int(devices), Path(folder), json.loads(settings))
    finally:
        leave_process_group()
