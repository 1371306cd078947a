"""Callbacks inside a test's job: what it leaves behind (samples of each step, processes), and a save that outlives its start."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import lightning as L

from aft.batch import Batch
from callbacks.saving import save_last


class Recorder(L.Callback):
    """Writes ``seen-RANK.jsonl`` (a line a finished step) and ``pid-RANK`` into a folder; a pause in each step gives a test time to act.

    Args:
        folder: where to write.
        pause: seconds.
    """

    def __init__(self, folder: Path, pause: float = 0.0) -> None:
        self.folder, self.pause = folder, pause

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        """The process and its step."""
        (self.folder / f"pid-{trainer.global_rank}").write_text(f"{os.getpid()} {trainer.global_step}")
        time.sleep(self.pause)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """The samples."""
        line = {"epoch": trainer.current_epoch, "step": trainer.global_step, "index": batch.index.tolist()}
        with (self.folder / f"seen-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


class Survivor(L.Callback):
    """In the first start of a job, rank 0 comes to a save and waits there until the test says ``go``; ``outcome`` says what came of it.

    Args:
        place: folder of ``waits``, ``go`` and ``outcome``.
        step: after which it saves.
    """

    def __init__(self, place: Path, step: int) -> None:
        self.place, self.step = place, step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Waits ten minutes at most, so that no test leaves it behind."""
        first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
        if not (first and trainer.is_global_zero and trainer.global_step == self.step):
            return
        (self.place / "waits").touch()
        end = time.monotonic() + 600
        while not (self.place / "go").is_file() and time.monotonic() < end:
            time.sleep(0.1)
        try:
            save_last(trainer)
        except Exception as error:
            (self.place / "outcome").write_text(f"{type(error).__name__}: {error}")
            raise
