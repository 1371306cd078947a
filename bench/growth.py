"""Whether a run leaves something behind at each step: live tensors, objects, memory of the process."""

from __future__ import annotations

import gc
import statistics
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch

from aft.batch import Batch

#: Tensors that have memory of their own.
REAL = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Census:
    """What was alive after a step.

    Args:
        step: how many optimiser steps were made.
        tensors: number of tensors that Python holds, without those that a traced graph left (they have shapes and no memory).
        bytes: of their storages, each once; of sparse tensors, none.
        objects: all that the garbage collector follows.
        resident: of the process, bytes; none where the system does not tell.
    """

    step: int
    tensors: int
    bytes: int
    objects: int
    resident: int | None

    @classmethod
    def now(cls, step: int) -> Census:
        """Of what is left after a collection."""
        gc.collect()
        objects = gc.get_objects()
        tensors = [one for one in objects if type(one) in REAL]
        real = [one.untyped_storage() for one in tensors if not one.is_meta and one.layout == torch.strided]
        storages = {storage.data_ptr(): storage.nbytes() for storage in real}
        return cls(step, len(tensors), sum(storages.values()), len(objects), status("VmRSS"))


class Growth(L.Callback):
    """Takes a census every so many steps; the first ones, while caches fill, belong to nobody.

    Args:
        every: optimiser steps between two.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.found: list[Census] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """After a step."""
        if trainer.global_step % self.every == 0:
            self.found.append(Census.now(trainer.global_step))

    @property
    def per_step(self) -> dict[str, float]:
        """What came each step: the median over the stretches between two censuses; 0 where nothing stays.

        What is made once, late (a module imported, a table filled), is in one stretch; what each step leaves is in all.
        """
        stretches = list(pairwise(asdict(one) for one in self.found))
        told = [key for key, value in stretches[0][0].items() if key != "step" and value is not None]
        return {key: statistics.median((after[key] - before[key]) / (after["step"] - before["step"]) for before, after in stretches)
                for key in told}  # fmt: skip


def status(name: str) -> int | None:
    """A line of /proc/self/status in bytes (``VmRSS``: now, ``VmHWM``: the most); none where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
