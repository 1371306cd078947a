"""Looks out for catastrophic overfitting, drift and collapse while a model trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from aft.attacks import FGSM, PGD, ClassificationObjective, sample_keys
from aft.batch import Batch
from aft.errors import ConfigError
from aft.methods import AdversarialFineTuning


class CollapseWatch(L.Callback):
    """Every so many steps, on the images of that step: robust accuracy under one large step and under many small ones.

    Logged: ``watch/one_step`` and ``watch/multi_step`` (robust accuracy of the training images under FGSM and under PGD, in the ball of
    training), ``watch/drift`` (one minus the mean cosine of clean embeddings to the teacher's: where no term has one, the model's that the
    run starts from; random weights are compared with themselves at this start) and ``watch/largest_class_share`` (of clean predictions).
    Warned of, once a run, with the step and the one of the look before, between which it began:

    * **catastrophic overfitting**: the model withstands one step and falls to several, which training with one step alone does not see;
    * **collapse**: nearly all images get one class.

    It costs about ``steps + 2`` forwards and backwards of that batch each time.

    Args:
        every: optimiser steps between two looks.
        steps: of the multi-step attack, each a quarter of eps.
        gap: one-step minus multi-step robust accuracy from which it warns.
        largest_share: of predictions in one class from which it warns.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(self, every: int = 50, steps: int = 10, gap: float = 0.2, largest_share: float = 0.9) -> None:
        for name, value in (("every", every), ("steps", steps)):
            if value < 1:
                raise ConfigError(f"{name} = {value} is below 1.")
        for name, share in (("gap", gap), ("largest_share", largest_share)):
            if not 0 < share <= 1:
                raise ConfigError(f"{name} = {share} is outside (0, 1].")
        self.every, self.steps, self.gap, self.largest_share = every, steps, gap, largest_share
        self.warned: set[str] = set()
        self.reference: tuple[Batch, Tensor] | None = None
        self.looked = -1
        self.before = -1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run need not say again."""
        return {"warned": sorted(self.warned), "looked": self.looked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        self.warned, self.looked = set(state_dict["warned"]), state_dict["looked"]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Keeps what the teacher says of this start's first batch, to measure the drift by."""
        if self.reference is None and isinstance(pl_module, AdversarialFineTuning):
            teacher = pl_module.teacher or pl_module.starting_model()
            with quietly(teacher):
                self.reference = (batch, teacher.encode(batch.images).unit_BD)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """A look, where it is due: the batch has labels and the method an attack with a radius."""
        step = trainer.global_step
        eps = getattr(pl_module, "eps_trained", None)
        if step % self.every or step == self.looked or not isinstance(pl_module, AdversarialFineTuning) or batch.labels is None or not eps:
            return
        self.before, self.looked = self.looked, step
        figures = self.look(pl_module, batch, batch.labels, eps)
        for name, value in figures.items():
            pl_module.log(f"watch/{name}", value, batch_size=len(batch.images))
        self._warn(step, figures)

    def look(self, module: AdversarialFineTuning, batch: Batch, labels_B: Tensor, eps: float) -> dict[str, float]:
        """The four figures."""
        model, text_KD = module.model, module.class_bank("train")
        objective = ClassificationObjective(lambda x: model(x, text_KD), labels_B, modules=(model,))
        keys_B = sample_keys(module.seed, module.current_epoch, batch.index)
        norm = getattr(module.attack, "norm", "linf")
        one_step = FGSM(eps=eps, norm=norm)
        multi_step = PGD(eps=eps, norm=norm, relative_step_size=0.25, steps=self.steps, keep="best")
        found = [attack(objective, batch.images, keys_B).x_BCHW for attack in (one_step, multi_step)]
        assert self.reference is not None
        first, before_BD = self.reference
        with quietly(model):
            answers_B = model(batch.images, text_KD).argmax(1)
            robust = [float(((answers_B == labels_B) & (model(x_BCHW, text_KD).argmax(1) == labels_B)).float().mean()) for x_BCHW in found]
            drift = 1 - float((model.encode(first.images).unit_BD * before_BD).sum(1).mean())
        share = answers_B.bincount(minlength=len(text_KD)).max() / len(answers_B)
        return {"one_step": robust[0], "multi_step": robust[1], "drift": drift, "largest_class_share": float(share)}

    def _warn(self, step: int, figures: dict[str, float]) -> None:
        one, multi, share = figures["one_step"], figures["multi_step"], figures["largest_class_share"]
        since = f" (not yet at step {self.before})" if self.before >= 0 else ""
        if one - multi >= self.gap and "overfitting" not in self.warned:
            self.warned.add("overfitting")
            warnings.warn(
                f"catastrophic overfitting at step {step}{since}: {100 * one:.0f} % of the training images withstand one step, "
                f"{100 * multi:.0f} % withstand {self.steps}. Train with more steps, a smaller step size or a smaller eps.", stacklevel=2,
            )  # fmt: skip
        if share >= self.largest_share and "collapse" not in self.warned:
            self.warned.add("collapse")
            warnings.warn(
                f"collapse at step {step}{since}: {100 * share:.0f} % of the images get one class. "
                "Lower lr, or look at eps and at the terms.", stacklevel=2,
            )  # fmt: skip


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Eval mode and no graph; afterwards every part's mode is as before."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training
