"""Progress: a bar in a terminal, lines of text in log files and pipes."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


class PlainProgress(L.Callback):
    """Prints one line a log interval and one a validation when the output is not a terminal (there, Lightning's bar is shown).

    A line has the step, the time left, the loss and each term, accuracies and images a second.
    """

    def __init__(self) -> None:
        self.silent = sys.stdout.isatty()
        self.last_step = -1
        self.started: tuple[float, int] | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One line a log interval."""
        step = trainer.global_step
        self.started = self.started or (time.perf_counter(), step)
        if step == self.last_step:  # another part of an accumulated step
            return
        self.last_step = step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step and step % every == 0:
            self._say(
                trainer,
                f"step {step}/{trainer.estimated_stepping_batches}{self._left(trainer, step)}",
                ("train/", "attack/", "speed/images"),
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """One line a validation."""
        self._say(trainer, f"validation at step {trainer.global_step}", ("val/",))

    def _left(self, trainer: L.Trainer, step: int) -> str:
        assert self.started is not None
        began, first = self.started
        if step <= first or trainer.estimated_stepping_batches == float("inf"):
            return ""
        seconds = (time.perf_counter() - began) / (step - first) * (trainer.estimated_stepping_batches - step)
        return f", {int(seconds) // 60}:{int(seconds) % 60:02d} left"

    def _say(self, trainer: L.Trainer, head: str, kinds: tuple[str, ...]) -> None:
        if self.silent or not trainer.is_global_zero:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(kinds)}
        print(f"{head}:", "  ".join(f"{name.partition('/')[2]} {_short(name, value)}" for name, value in values.items()), flush=True)


def _short(name: str, value: float) -> str:
    if name.endswith("accuracy") or "accuracy/" in name:
        return f"{100 * value:.1f}%"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


class TerminalProgress(RichProgressBar):
    """Lightning's bar, which counts passes from 1 and knows their number also where a run is given in steps."""

    def _get_train_description(self, current_epoch: int) -> str:
        steps, batches = self.trainer.estimated_stepping_batches, float(self.trainer.num_training_batches)
        passes = steps * self.trainer.accumulate_grad_batches / batches
        return f"Pass {current_epoch + 1}" + (f"/{math.ceil(passes)}" if math.isfinite(passes) else "")

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The figures without their groups (``loss``, ``adversarial_accuracy``), and without the logger's version."""
        shown = super().get_metrics(trainer, pl_module)
        return {name.rpartition("/")[2] if name.startswith("train/") else name: value for name, value in shown.items() if name != "v_num"}
