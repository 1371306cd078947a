"""How fast a run goes, and how long it waits for data."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from aft.batch import Batch


class Throughput(L.Callback):
    """Logs ``speed/images_per_second`` (of all processes) and ``speed/data_wait`` (share of the time spent waiting for batches).

    Both are means since the last log entry. Validation is not counted.
    """

    def __init__(self) -> None:
        self.last_step = -1
        self._reset()

    def _reset(self) -> None:
        self.images, self.busy, self.waited = 0, 0.0, 0.0
        self.ended: float | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        """A batch has come."""
        self.started = time.perf_counter()
        if self.ended is not None:
            self.waited += self.started - self.ended

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """A step is done."""
        self.ended = time.perf_counter()
        self.busy += self.ended - self.started
        self.images += len(batch.images) * trainer.world_size
        if trainer.global_step == self.last_step:  # another part of an accumulated step
            return
        self.last_step = trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0 and self.busy > 0:
            total = self.busy + self.waited
            pl_module.log("speed/images_per_second", self.images / total)
            pl_module.log("speed/data_wait", self.waited / total)
            self._reset()
            self.ended = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The time from here to the next step is no waiting."""
        self.ended = None
