"""A stop from outside (Ctrl-C, SIGTERM, SIGUSR1) waits for the end of a step, saves, and ends the process."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(SystemExit):
    """Ends the process with 128 + the signal's number (143 for SIGTERM, 130 for Ctrl-C), after the checkpoint is there."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class Interruption(L.Callback):
    """Saves ``last.ckpt`` at the end of the step in which a signal came to any process, and stops all of them.

    The handler sets a flag and nothing else; processes agree by a maximum over their flags after each step, on the CPU, so no GPU waits.
    (Lightning 2.6 broadcasts from inside the handler, which hangs when one process alone is signalled, saves nothing, and exits with 0.)
    A second signal stops at once, without saving. A validation that runs is finished first.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.last_step = 0
        self.group: Any = None
        self.before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the signals over from Lightning, which has just set its own handlers."""
        self.asked, self.last_step = 0, trainer.global_step
        if trainer.world_size > 1:
            self.group = dist.new_group(backend="gloo")
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # a wait for the GPU in every step
        if threading.current_thread() is threading.main_thread():
            self.before = {signum: signal.signal(signum, self._ask) for signum in SIGNALS}

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = signum
        print(f"\n{signal.Signals(signum).name}: stopping after this step; a second one stops at once, without saving", flush=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Looks, at the end of a whole optimiser step, whether anyone was asked to stop."""
        if trainer.global_step == self.last_step:  # another part of an accumulated step
            return
        self.last_step = trainer.global_step
        asked = torch.tensor(self.asked)
        if self.group is not None:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.group)
        if not asked:
            return
        saved = self._save(trainer)
        if trainer.is_global_zero:
            name = signal.Signals(int(asked)).name
            say = "the same command with --ckpt_path last goes on" if saved else "nothing was saved, checkpoints are off"
            print(f"\n{name}: stopped after step {trainer.global_step}; {say}", flush=True)
        raise Stopped(int(asked))

    @staticmethod
    def _save(trainer: L.Trainer) -> bool:
        saver = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath), None)
        if saver is not None:
            trainer.save_checkpoint(Path(str(saver.dirpath)) / "last.ckpt")
        return saver is not None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives the signals back."""
        self._give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives the signals back; after a stop at once, says how to go on."""
        self._give_back()
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            print(f"\nstopped in step {trainer.global_step + 1}: the same command with --ckpt_path last goes on from the last checkpoint")

    def _give_back(self) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        self.before = {}
