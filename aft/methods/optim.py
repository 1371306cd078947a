"""The optimiser and its schedule, from a few typed settings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from timm.optim.muon import Muon
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from aft.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class OptimizerSpec:
    """How weights move.

    Args:
        name: ``adamw``, ``sgd`` as in most published recipes, or ``muon`` (orthogonalised momentum for the matrices inside
            transformer blocks, AdamW for the rest; its steps are scaled to AdamW's size, so ``lr`` means the same).
        lr: peak learning rate.
        weight_decay: on matrices only; norms, biases and the logit scale are never decayed.
        momentum: of SGD; Muon's is 0.95.
        betas: of AdamW.
        warmup_steps: optimiser steps of linear warm-up from ``lr / warmup_steps``.
        schedule: ``cosine``, which reaches zero after the last step, or ``constant``.
        lr_for: images of an optimiser step, over all processes and accumulated parts, that ``lr`` is meant for; with another number it
            is scaled in proportion (linear scaling, arXiv 1706.02677), and that is said. None: ``lr`` holds as it is given.
    """

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    lr: float = 1e-5
    weight_decay: float = 1e-4
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    lr_for: int | None = None

    def __post_init__(self) -> None:
        for key, given, allowed in (("name", self.name, ("adamw", "sgd", "muon")), ("schedule", self.schedule, ("cosine", "constant"))):
            if given not in allowed:
                raise ConfigError(unknown_name(f"optimizer {key}", given, allowed))
        if not self.weight_decay >= 0:
            raise ConfigError(f"weight_decay = {self.weight_decay} is negative: use 0 for none.")
        if not self.lr > 0:
            raise ConfigError(f"lr = {self.lr} is not above 0: the model would not learn.")
        if self.lr_for is not None and self.lr_for < 1:
            raise ConfigError(f"lr_for = {self.lr_for} is below 1: give the images of a step that lr is meant for, or null.")
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps = {self.warmup_steps} is negative: use 0 for none.")

    def at(self, images: int) -> OptimizerSpec:
        """The same for steps of so many images: ``lr * images / lr_for``."""
        return self if self.lr_for is None else replace(self, lr=self.lr * images / self.lr_for, lr_for=None)

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """The optimiser over these parameters.

        Raises:
            ConfigError: there is nothing to train.
        """
        trained = [(name, p) for name, p in named_parameters if p.requires_grad]
        if not trained:
            raise ConfigError("no parameter is trainable: choose what to train.")
        hidden = [p for name, p in trained if self.name == "muon" and p.ndim == 2 and "blocks." in name]
        held = {id(p) for p in hidden}
        groups: list[dict[str, Any]] = [
            {"params": hidden, "weight_decay": self.weight_decay},
            {"params": [p for _, p in trained if p.ndim >= 2 and id(p) not in held], "weight_decay": self.weight_decay},
            {"params": [p for _, p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        if self.name == "muon":
            groups = [{**group, "use_muon": group["params"] is hidden} for group in groups]
        groups = [group for group in groups if group["params"]]
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        if self.name == "muon":
            return Muon(groups, lr=self.lr, betas=self.betas, momentum=0.95, nesterov=True)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)

    def schedule_of(self, optimizer: torch.optim.Optimizer, total_steps: Callable[[], float]) -> LambdaLR:
        """Warm-up, then cosine. The total is asked for lazily: a loader's length may be known only when training starts."""
        return LambdaLR(optimizer, lambda step: self.factor(step, total_steps))

    def factor(self, step: int, total_steps: Callable[[], float]) -> float:
        """What ``lr`` is multiplied by at an optimiser step (0 is the first)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        if step == 0:  # asked when the schedule is built, before the length is known
            return 1.0
        total = total_steps()
        done = (step - self.warmup_steps) / max(1.0, total - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def check_length(self, total: float) -> None:
        """Looks at a run's number of optimiser steps before the first.

        Raises:
            ConfigError: a cosine without an end.
        """
        if self.schedule == "cosine" and math.isinf(total):
            raise ConfigError("a cosine schedule needs an end: set trainer.max_steps, or trainer.max_epochs with data of known length.")
        if self.warmup_steps >= total:
            warnings.warn(
                f"warmup_steps = {self.warmup_steps} is not below the run's {total:.0f} steps: lr never reaches {self.lr}.", stacklevel=2
            )

    def impose(self, optimizer: torch.optim.Optimizer, schedule: LambdaLR, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Writes these settings over those that a checkpoint brought along; moments and step counts stay."""
        schedule.base_lrs = [self.lr for _ in schedule.base_lrs]
        for group, new, factor in zip(optimizer.param_groups, self.build(named_parameters).param_groups, schedule.lr_lambdas, strict=True):
            settings = {key: value for key, value in new.items() if key != "params"}
            group.update(settings, initial_lr=self.lr, lr=self.lr * factor(schedule.last_epoch))
