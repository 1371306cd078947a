"""What a run inside a test's job leaves behind: which samples each step saw, and where its processes are."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import lightning as L

from aft.batch import Batch


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
