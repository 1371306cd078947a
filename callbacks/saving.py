"""When the checkpoint to go on from is written, besides the one that is chosen by a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from aft.errors import ConfigError


class KeepSaving(L.Callback):
    """Writes ``last.ckpt`` at the end of every so many optimiser steps: what a machine that is lost without a signal costs at most.

    Args:
        every_n_steps: optimiser steps between two.

    Raises:
        ConfigError: fewer than one.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"every_n_steps = {every_n_steps} is below 1.")
        self.every_n_steps = every_n_steps
        self.last_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Acts after the other callbacks."""
        after_the_others(trainer, self)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The step that a resumed run starts from is on disk already."""
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Where a whole optimiser step is done, and it is time."""
        if trainer.global_step != self.last_step and trainer.global_step % self.every_n_steps == 0:
            save_last(trainer)
        self.last_step = trainer.global_step


def save_last(trainer: L.Trainer) -> bool:
    """Writes ``last.ckpt`` in the run's folder of checkpoints; every process must call it. False where checkpoints are off."""
    saver = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath), None)
    if saver is not None:
        trainer.save_checkpoint(Path(str(saver.dirpath)) / "last.ckpt")
    return saver is not None


def after_the_others(trainer: L.Trainer, callback: L.Callback) -> None:
    """Puts a callback behind all others but Lightning's checkpoints: what is saved then holds this step of the others, too.

    (An average of the weights that is updated after the checkpoint would lack a step in every resumed run.)
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    rest = [one for one in callbacks if one is not callback]
    place = next((place for place, one in enumerate(rest) if isinstance(one, Checkpoint)), len(rest))
    trainer.callbacks = [*rest[:place], callback, *rest[place:]]  # type: ignore[attr-defined]
