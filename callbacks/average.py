"""An average of the weights over training, which is what is validated, saved and used."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from aft.errors import ConfigError

KEY = "averaged_weights"


class AveragedWeights(L.Callback):
    """Exponential moving average of what is trained: ``a_t = d_t a_(t-1) + (1 - d_t) w_t`` with ``d_t = min(decay, (1 + t) / (10 + t))``.

    Validation and checkpoints take the average; training goes on with the weights themselves, which lie in the checkpoint beside it, so
    that a resumed run ends as an uninterrupted one. Frozen weights, and a teacher, are not copied. (Lightning's own averaging copies the
    whole module.)

    Args:
        decay: share of the old average that a step keeps, once there are many steps; 0.999 remembers about 1,000 of them.

    Raises:
        ConfigError: decay is not in [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"decay = {decay} is not in [0, 1): 0.999 averages over about 1,000 steps.")
        self.decay = decay
        self.steps = 0
        self.average: dict[str, Tensor] = {}
        self.learning: dict[str, Tensor] = {}
        self.last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the average; after a resume the module holds it, and the training weights come back from the checkpoint."""
        self.last_step = trainer.global_step
        self.average = {name: p.detach().clone() for name, p in trained(pl_module)}
        if self.learning:
            write(pl_module, self.learning)
            self.learning = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One update an optimiser step."""
        if trainer.global_step == self.last_step:  # another part of an accumulated step
            return
        self.last_step = trainer.global_step
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for name, p in trained(pl_module):
            self.average[name].lerp_(p.detach(), 1 - decay)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Puts the average in."""
        if self.average:
            self.learning = {name: p.detach().clone() for name, p in trained(pl_module)}
            write(pl_module, self.average)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes it out: the training weights are as they were, to the bit."""
        if self.average:
            write(pl_module, self.learning)
            self.learning = {}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stopped in the middle of a validation."""
        if self.learning:
            self.on_validation_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The checkpoint's weights are the average; the training weights lie beside them."""
        if self.average:
            names = self.average.keys() & checkpoint["state_dict"].keys()
            checkpoint[KEY] = {"steps": self.steps, "training": {name: checkpoint["state_dict"][name] for name in sorted(names)}}
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **self.average}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the training weights until training starts; a checkpoint made without an average begins one."""
        stored = checkpoint.get(KEY, {"steps": 0, "training": {}})
        self.steps, self.learning = stored["steps"], stored["training"]


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What the optimiser moves."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def write(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Copies values into the parameters of these names."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
