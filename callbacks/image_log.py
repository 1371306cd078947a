"""What the attack does, to look at.

Shapes: B images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional

from aft.attacks import undisturbed
from aft.methods import AdversarialFineTuning

MARGIN = 2


class ImageLog(L.Callback):
    """Writes a picture to TensorBoard: a row each of clean images, adversarial images, and their difference, amplified.

    A text entry beside it has the true class and the classes predicted for the clean and the adversarial image.

    Args:
        every_n_steps: optimiser steps between two pictures; the first is of the run's first step.
        images: columns.
        enlarge: factor by which small images are enlarged.
    """

    def __init__(self, every_n_steps: int = 100, images: int = 8, enlarge: int = 3) -> None:
        self.last_step = -1
        self.every_n_steps, self.images, self.enlarge = every_n_steps, images, enlarge

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One picture every ``every_n_steps``."""
        writer, step = getattr(trainer.logger, "experiment", None), trainer.global_step
        if not isinstance(pl_module, AdversarialFineTuning) or not hasattr(writer, "add_image"):
            return
        if (step != 1 and step % self.every_n_steps) or step == self.last_step:  # the latter: another part of an accumulated step
            return
        self.last_step = trainer.global_step
        clean_BCHW, adversarial_BCHW = batch.images[: self.images], pl_module.last_adversarial_BCHW
        if adversarial_BCHW is None or batch.labels is None:
            return
        adversarial_BCHW = adversarial_BCHW[: self.images]
        writer.add_image("attack/clean_adversarial_difference", self.picture(clean_BCHW, adversarial_BCHW), trainer.global_step)
        writer.add_text(
            "attack/predictions", self.table(pl_module, clean_BCHW, adversarial_BCHW, batch.labels[: self.images]), trainer.global_step
        )

    def picture(self, clean_BCHW: Tensor, adversarial_BCHW: Tensor) -> Tensor:
        """Three rows of images, ``[C, height, width]`` in [0, 1]; in the third, grey means no change and the largest change is full."""
        difference_BCHW = (adversarial_BCHW - clean_BCHW).float()
        largest = difference_BCHW.abs().amax().clamp_min(1e-8)
        rows = [clean_BCHW.float(), adversarial_BCHW.float(), 0.5 + 0.5 * difference_BCHW / largest]
        enlarged = [functional.interpolate(row, scale_factor=self.enlarge, mode="nearest") for row in rows]
        lines = [torch.cat(list(functional.pad(row, (MARGIN,) * 4, value=1.0)), dim=2) for row in enlarged]
        return torch.cat(lines, dim=1).clamp(0, 1).cpu()

    @staticmethod
    def table(method: AdversarialFineTuning, clean_BCHW: Tensor, adversarial_BCHW: Tensor, labels_B: Tensor) -> str:
        """True and predicted classes as a Markdown table."""
        names, text_KD = method.data.class_lists["train"], method.class_bank("train")
        with undisturbed((method.model,)), torch.no_grad():  # eval mode, random streams as they were
            clean_B, adversarial_B = (method.model(x, text_KD).argmax(1) for x in (clean_BCHW, adversarial_BCHW))
        rows = [
            f"| {names[y]} | {names[c]} | {names[a]} |"
            for y, c, a in zip(labels_B.tolist(), clean_B.tolist(), adversarial_B.tolist(), strict=True)
        ]
        return "\n".join(["| true | clean | adversarial |", "|---|---|---|", *rows])
