"""Measures a few steps, and ends the run: what an estimate of a whole run's cost rests on."""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L

from aft.batch import Batch
from aft.errors import ConfigError, RunError
from aft.methods import AdversarialFineTuning


class Probe(L.Callback):
    """Stops after ``steps`` optimiser steps and writes ``probe.json`` into the run folder.

    It holds ``seconds`` (of a step, median; the time waited for data is in it), ``timed`` (steps that is the median of), ``images`` (of a
    step of this process), ``steps`` (of the whole run on one process) and ``fixed`` (the run's length is given in steps). A method's
    ``phases`` are left out: the steps that are timed would all lie in the first one, and its price is not that of the run.

    Args:
        steps: optimiser steps to make.
        skip: of these, the first ones, which are slower: not timed.

    Raises:
        ConfigError: no step is left to time.
    """

    def __init__(self, steps: int = 20, skip: int = 5) -> None:
        if not 0 < skip < steps:
            raise ConfigError(f"steps = {steps}, skip = {skip}: skip at least one step, and time at least one.")
        self.steps, self.skip = steps, skip
        self.ends: list[float] = []
        self.images = 0
        self.last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves out phases; a run without an end costs nothing that could be told.

        Raises:
            RunError: it has none.
        """
        self.last_step = trainer.global_step
        if isinstance(pl_module, AdversarialFineTuning):
            pl_module.phases = []
        if not math.isfinite(trainer.estimated_stepping_batches):
            raise RunError("the run has no end, so there is no estimate: set trainer.max_steps or trainer.max_epochs.")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Counts, and ends the run when there is enough."""
        if trainer.global_step == self.last_step:  # another part of an accumulated step
            return
        self.last_step = trainer.global_step
        self.ends.append(time.perf_counter())
        self.images = len(batch.images) * trainer.accumulate_grad_batches
        if len(self.ends) >= self.steps:
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes what was found.

        Raises:
            RunError: the run ended before a step was timed.
        """
        seconds = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)][self.skip - 1:]
        if not seconds:
            raise RunError(f"the run has {len(self.ends)} steps, too few to time: the estimate needs more than {self.skip + 1}.")
        found = {"seconds": statistics.median(seconds), "timed": len(seconds), "images": self.images,
                 "steps": float(trainer.estimated_stepping_batches), "fixed": trainer.max_steps > 0}  # fmt: skip
        if trainer.is_global_zero:
            (Path(trainer.default_root_dir) / "probe.json").write_text(json.dumps(found), encoding="utf-8")
