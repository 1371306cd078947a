"""A stop from outside (Ctrl-C, SIGTERM, SIGUSR1) waits for the end of a step, saves, and ends the process."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from callbacks.saving import after_the_others, save_last

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(SystemExit):
    """Ends the process with 128 + the signal's number (143 for SIGTERM, 130 for Ctrl-C), after the checkpoint is there."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class Interruption(L.Callback):
    """Saves ``last.ckpt`` at the end of the step in which a signal came to any process, and stops all of them.

    The handler sets a flag and nothing else; processes agree by a maximum over their flags after each step, on the CPU, so no GPU waits.
    (Lightning 2.6 broadcasts from inside the handler, which hangs when one process alone is signalled, saves nothing, and exits with 0.)
    A second Ctrl-C stops at once, without saving; SIGTERM and SIGUSR1 come from a scheduler, which repeats them, and wait on. A validation
    that runs is finished first. Signals before the first step end the process as they would any other.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.last_step = 0
        self.group: Any = None
        self.before: dict[signal.Signals, Any] = {}
        self.process = os.getpid()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Acts after the other callbacks, and keeps Lightning's handlers out: they communicate, and save in the middle of a step."""
        after_the_others(trainer, self)
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on a signal waits for the end of a step."""
        self.asked, self.last_step, self.process = 0, trainer.global_step, os.getpid()
        if trainer.world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=getattr(trainer.strategy, "_timeout", None))
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # a wait for the GPU in every step
        if threading.current_thread() is threading.main_thread():
            self.before = {signum: signal.signal(signum, self._ask) for signum in SIGNALS}

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a forked child: SLURM signals every process of a step
            return
        if self.asked == signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked:
            return
        self.asked = signum
        more = "; a second one stops at once, without saving" if signum == signal.SIGINT else ""
        print(f"\n{signal.Signals(signum).name}: stopping after this step{more}", flush=True)

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
        saved = save_last(trainer)
        flush(trainer)
        if trainer.is_global_zero:
            name = signal.Signals(int(asked)).name
            say = "the same command with --ckpt_path last goes on" if saved else "nothing was saved, checkpoints are off"
            print(f"\n{name}: stopped after step {trainer.global_step}; {say}", flush=True)
        raise Stopped(int(asked))

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


def flush(trainer: L.Trainer) -> None:
    """Logs the step that has just ended, which Lightning does after the callbacks, and writes what the loggers hold back."""
    trainer._logger_connector.update_train_step_metrics()
    for logger in trainer.loggers if trainer.is_global_zero else ():
        write = getattr(getattr(logger, "experiment", None), "flush", None)
        if write is not None:
            write()
