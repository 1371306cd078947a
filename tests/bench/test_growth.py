"""Nothing grows over 1,000 steps of a real run with the callbacks that a run has; and what would grow is seen."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from aft.attacks import PGD
from aft.batch import Batch
from aft.clip import ModelSpec
from aft.methods import OptimizerSpec, TeCoA
from bench.growth import Census, Growth, status
from callbacks import AveragedWeights, CollapseWatch, ImageLog, Interruption, Throughput
from tests.conftest import MemoryData, make_trainer

#: Of a step. A tensor or an object left behind each step is at least twice as much.
BOUNDS = {"tensors": 0.05, "bytes": 100.0, "objects": 0.5, "resident": 20_000.0}


class Endless(MemoryData):
    """The same few images, as often as asked."""

    def train_dataloader(self) -> DataLoader[Batch]:
        """More batches than steps."""
        return DataLoader(self.batches() * 500, batch_size=None)  # type: ignore[arg-type]


class Leak(L.Callback):
    """Keeps something of each step."""

    def __init__(self, what: Callable[[Any], object]) -> None:
        self.what, self.kept = what, []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """One thing more."""
        self.kept.append(self.what(outputs))


def grown(folder: Path, steps: int, every: int, *leaks: L.Callback) -> dict[str, float]:
    """What each step left behind, among those after the first census."""
    growth = Growth(every)
    method = TeCoA(ModelSpec("tiny"), attack=PGD(eps="8/255", step_size="4/255", steps=1),
                   optimizer=OptimizerSpec(lr=1e-4, schedule="constant"))  # fmt: skip
    callbacks = [Throughput(), ImageLog(), CollapseWatch(), AveragedWeights(decay=0.99), Interruption(), *leaks, growth]
    logger = TensorBoardLogger(str(folder), default_hp_metric=False)
    trainer = make_trainer(folder, max_steps=steps, limit_val_batches=0, logger=logger, log_every_n_steps=10, callbacks=callbacks)
    trainer.fit(method, datamodule=Endless(count=8, batch_size=4))
    assert trainer.global_step == steps
    return growth.per_step


def test_nothing_grows_over_1000_steps(tiny: ModelSpec, tmp_path: Path) -> None:
    """Live tensors, their bytes, objects and the process's memory, in most of the stretches of 100 steps."""
    found = grown(tmp_path, 1000, 100)
    assert {key: value for key, value in found.items() if value > BOUNDS[key]} == {}


@pytest.mark.parametrize(
    ("what", "seen"),
    [
        (lambda outputs: outputs["loss"].clone(), {"tensors", "objects"}),
        (lambda outputs: [], {"objects"}),
    ],
    ids=["tensor", "object"],
)
def test_what_grows_is_seen(tiny: ModelSpec, tmp_path: Path, what: Callable[[Any], object], seen: set[str]) -> None:
    """A callback that keeps a tensor or an object of each step is above the bound of the test before."""
    found = grown(tmp_path, 120, 20, Leak(what))
    assert seen <= {key for key, value in found.items() if value > BOUNDS[key]}


def test_what_comes_once_is_not_growth() -> None:
    """A late import in one stretch belongs to nobody; less and less of what came before does not hide what comes each step."""
    growth = Growth(100)
    growth.found = [Census(100 * place, 10, 0, objects, None) for place, objects in enumerate((0, 0, 50_000, 50_000, 50_000))]
    assert growth.per_step == {"tensors": 0.0, "bytes": 0.0, "objects": 0.0}
    growth.found = [Census(100 * place, 10, 0, objects, None) for place, objects in enumerate((0, 100, -5_000, -4_900, -4_800))]
    assert growth.per_step["objects"] == 1.0


def test_sparse_tensors_are_counted() -> None:
    """They have no one storage; somebody's does not end the census."""
    before = Census.now(0).tensors
    kept = torch.eye(3).to_sparse()
    assert Census.now(0).tensors == before + 1 and kept.is_sparse


def test_memory_of_the_process_is_seen() -> None:
    """Of pages from the system, whatever an allocator still holds of what was freed before."""
    before = status("VmRSS")
    with mmap.mmap(-1, 2**28) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        after = status("VmRSS")
        assert before is None or (after is not None and after - before > len(block) / 2)
